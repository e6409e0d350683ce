"""`condenser prepare`: text in, token store out.

blocks.py says how documents are cut, store.py what is written, work.py who does it, merge.py how it ends. Here is how
it begins: settings are checked, and the store is begun, gone on with, or added to.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from condenser.corpus.blocks import Blocks
from condenser.corpus.documents import Document, check, documents
from condenser.corpus.merge import EmptyStoreError, merge
from condenser.corpus.readers import Columns, resolve, units
from condenser.corpus.tokenizers import obtain_tokenizer
from condenser.corpus.work import UNFINISHED, Job, available_cores, do_share, reading
from condenser.data.store import MANIFEST, missing_files, read_json, read_manifest, tokenizer_hash, write_json
from condenser.data.tokenizers import load_tokenizer

UNIT_BYTES = 4 << 20, 32 << 20  # the least and the most of the input in one unit; in between, there are 512 units


def prepare(
    *,
    input: list[str],
    tokenizer: str,
    output: str,
    kind: Literal["blocks", "spans"] = "blocks",
    text_column: str = "text",
    title_column: str | None = None,
    id_column: str = "id",
    max_length: int = 128,
    min_length: int = 1,
    short_fraction: float = 0.1,
    validation_fraction: float = 0.01,
    language: str = "en",
    word_segmenter: str | None = None,
    skip_bad_lines: bool = False,
    append: bool = False,
    seed: int = 0,
    workers: int | None = None,
    shard: str | None = None,
    engine: Literal["processes", "ray"] = "processes",
) -> None:
    """Turn text into a token store.

    Documents are cut into rows of whole sentences of up to --max-length tokens; a sentence that is longer goes on in
    the next row. The same command on an unfinished store goes on where it stopped, on a finished one does nothing.
    On several machines, give each the same command with its --shard, then run `condenser prepare merge` once.

    Args:
        input: files (.jsonl, .parquet, .txt; .gz, .xz or .zst of them), folders, glob patterns, or a Hugging Face
            dataset (a saved folder, or NAME[:CONFIGURATION] on the hub). In plain text a blank line ends a document.
        tokenizer: a folder, a hub name, or train:SIZE for a lower-casing WordPiece trained on the input.
        output: the store's folder.
        kind: blocks are independent rows; spans are those of documents with at least two (coCondenser).
        text_column: the field or column that holds the text.
        title_column: the field or column of a title, which is put before the text as a line of its own.
        id_column: the field or column, where there is one, whose repetitions are counted.
        max_length: tokens of a row, [CLS] and [SEP] included.
        min_length: rows with fewer tokens than this are dropped, and counted.
        short_fraction: share of the rows with a random shorter target length.
        validation_fraction: share of the documents in the validation split, chosen by a hash of their text.
        language: language of the sentence splitter, as an ISO 639-1 code.
        word_segmenter: module:function from a text to its words, for scripts without spaces (jieba:cut); otherwise
            there each token is a word.
        skip_bad_lines: count what cannot be used instead of stopping at the first.
        append: add inputs to a finished store; what is in it stays as it is.
        seed: seed of the shorter target lengths and of the split.
        workers: processes; all cores by default. The result does not depend on it.
        shard: do one share of the work, I/N with I from 0 (--shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT).
        engine: processes of this machine, or a Ray cluster (needs the extra condenser[ray]).

    Raises:
        ValueError: unreadable input, an unsuitable tokenizer, or an output folder that holds something else.
    """
    index, count = share_of(shard)
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    if count > 1 and (tokenizer.startswith("train:") or engine == "ray"):
        raise ValueError(f"--shard {shard} needs a tokenizer that is there already, and --engine processes")
    blocks = Blocks(kind, max_length, min_length, short_fraction, validation_fraction, language, word_segmenter, seed)
    columns = Columns(text_column, title_column, id_column)
    sources = resolve(input)
    check(sources, columns, skip_bad_lines)  # what cannot work stops here, before anything is written
    folder = Path(output)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "text_column": text_column, "title_column": title_column}
    settings |= {"title_prepended": title_column is not None, "id_column": id_column, **asdict(blocks)}
    fingerprints = [source.fingerprint() for source in sources]
    started, todo = find_state(folder, settings, fingerprints, append)
    if not todo:
        print(f"{output} is already prepared: nothing to do")
        return
    if started is None:
        n_bytes = sum(source.size() for source in sources)
        started = new_state(folder, settings, [fingerprints[place] for place in todo], n_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / UNFINISHED, started)  # from here on, the folder is a store in the making
    first_source = started["first_source"]
    sources = [sources[place] for place in todo]
    job = Job(folder, sources, first_source, columns, blocks, started["settings"]["unit_bytes"], skip_bad_lines)
    try:
        store_tokenizer(folder, tokenizer, job)
        if engine == "ray":
            from condenser.corpus.ray_engine import do_all

            do_all(job, workers)
        else:
            do_share(job, index, count, workers or available_cores())
        if count == 1:
            merge(output)
        else:
            print(f"{output}: share {index} of {count} is done; `condenser prepare merge {output}` when all are")
    except BaseException as error:
        units_there = list(folder.glob(f"units/{first_source:05d}-*.json"))
        if count == 1 and (not units_there or isinstance(error, EmptyStoreError)):
            forget(folder, first_source)  # nothing to go on from: leave no trace
        raise


def share_of(shard: str | None) -> tuple[int, int]:
    index, _, count = (shard or "0/1").partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--shard {shard}: give I/N with I from 0 to N - 1, such as 0/8")
    return int(index), int(count)


def find_state(
    folder: Path, settings: dict[str, Any], fingerprints: list[dict], append: bool
) -> tuple[dict[str, Any] | None, list[int]]:
    """The state of a store in the making, if there is one, and which of the inputs are to be done.

    Raises:
        ValueError: the folder holds something else, or a store of other settings or inputs.
    """
    if not folder.exists() or (folder.is_dir() and all(path.suffix == ".partial" for path in folder.iterdir())):
        return None, list(range(len(fingerprints)))
    if not folder.is_dir():
        raise ValueError(f"--output {folder} is a file")
    unfinished = (folder / UNFINISHED).is_file()
    if not unfinished and not (folder / MANIFEST).is_file():
        raise ValueError(f"--output {folder} is not empty and holds no token store; choose another folder")
    state = read_json(folder / UNFINISHED, "settings", "first_source") if unfinished else read_manifest(folder)
    written, changed = state["settings"], []
    done = written["sources"][: state["first_source"]] if unfinished else written["sources"] if append else []
    todo = [place for place, fingerprint in enumerate(fingerprints) if not append or fingerprint not in done]
    if (unfinished or not append) and [*done, *(fingerprints[place] for place in todo)] != written["sources"]:
        changed.append("input")
    changed += sorted(key for key in settings if settings[key] != written.get(key))
    if changed:
        raise ValueError(
            f"{folder} holds a store made with another {', '.join(changed)}; choose another --output, or remove it"
            + (" (--append adds inputs to it)" if changed == ["input"] and not append else "")
        )
    if unfinished:
        return state, todo
    lost = missing_files(folder, state["splits"]) + [
        path for unit in state["units"] if not (path := folder / "units" / f"{unit}.json").is_file()
    ]
    if lost and append:
        raise ValueError(f"{lost[0]} is missing or damaged: first repair the store with the command that made it")
    if lost:
        return {"first_source": 0, "settings": written}, todo
    return None, todo if append else []


def new_state(folder: Path, settings: dict[str, Any], new: list[dict[str, Any]], n_bytes: int) -> dict[str, Any]:
    """What is kept of a store in the making; of a finished one that is added to, with its settings."""
    unit_bytes = int(np.clip(n_bytes // 512, *UNIT_BYTES))
    settings, earlier = settings | {"unit_bytes": unit_bytes}, []
    if (folder / MANIFEST).is_file():
        settings = read_manifest(folder)["settings"]
        earlier = settings["sources"]
    return {"first_source": len(earlier), "settings": settings | {"sources": [*earlier, *new]}}


def forget(folder: Path, first_source: int) -> None:
    """Leave a folder as it was before its first unit."""
    if first_source:
        (folder / UNFINISHED).unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def store_tokenizer(folder: Path, spec: str, job: Job) -> None:
    """Obtain the store's tokenizer the first time; see that it is still the same when the store grows or goes on."""
    place = folder / "tokenizer"
    if not place.exists():
        with reading(job, "training the tokenizer", spec.startswith("train:")) as read:
            tokenizer = obtain_tokenizer(spec, lambda: texts(job, read))
        partial = folder / f"tokenizer.{uuid.uuid4().hex[:8]}.partial"
        tokenizer.init_kwargs.pop("local_files_only", None)  # of the environment, not of the tokenizer
        try:
            tokenizer.save_pretrained(partial)
        except Exception as error:  # the tokenizers library has no kinds of errors
            raise OSError(f"{place} cannot be written: {error}") from error
        try:
            partial.rename(place)
        except OSError:  # another machine was faster
            shutil.rmtree(partial)
    elif not spec.startswith("train:") and tokenizer_hash(load_tokenizer(spec)) != tokenizer_hash(
        load_tokenizer(place)
    ):
        raise ValueError(
            f"the tokenizer {spec} has changed since {folder} was begun, which holds a copy of the old one"
        )


def texts(job: Job, read: Callable[[int, int], None]) -> Iterator[str]:
    for place, source in enumerate(job.sources):
        for unit in units(source, job.columns, job.unit_bytes):
            for document in documents(unit, source, job.columns):
                if isinstance(document, Document):
                    yield document.text
                elif not job.skip_bad_lines:
                    raise document
            read(place, unit.position)
