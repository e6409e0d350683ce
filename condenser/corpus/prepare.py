"""`condenser prepare`: text in, token store out.

inputs.py says what is read, blocks.py how documents are cut, repeats.py which are dropped, store.py what is written,
work.py who does it, merge.py how it ends. Here is how it begins: settings are checked, and the store is begun, gone on
with, or added to.

    source     one input: a file, or a dataset
    record     a line, a run of lines, or a row of a table: what holds a document
    unit       a part of a source, some megabytes of whole records: what a process works on at a time
    share      of the units: what a machine works on
    row        a piece of a document, in tokens: what is trained on
    shard      an Arrow file of rows: those of a unit in a split
    number     the place in an order, from 0; of lines and rows of tables from 1
    id         of a document what its file calls it; of a token its number in the vocabulary
    key        a 64-bit hash of a document's id or text
    visit      how often a row was seen before, which its masks depend on; in one store alone, the epoch
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from condenser.corpus.blocks import Blocks
from condenser.corpus.documents import check, documents
from condenser.corpus.inputs import in_short, resolve
from condenser.corpus.merge import UselessError, earlier_units, partial_files, put_together, remove, remove_leftovers
from condenser.corpus.readers import Source, place
from condenser.corpus.tokenizers import store_tokenizer
from condenser.corpus.work import (
    UNFINISHED,
    Job,
    Share,
    at_work,
    available_cores,
    do_share,
    do_shares_on_ray,
    find_repeats,
    keys_path,
    outcome_path,
    progress,
)
from condenser.data.store import MANIFEST, SPLITS, checksum, missing_files, read_json, read_manifest, write_json

UNIT_BYTES = 4 << 20, 32 << 20  # the least and the most of the input in one unit; in between, there are 512 units


def prepare(
    *,
    input: list[str | Path] | str | Path,
    tokenizer: str | Path,
    output: str | Path,
    kind: Literal["blocks", "spans"] = "blocks",
    text_column: str = "text",
    title_column: str | None = None,
    id_column: str = "id",
    split: str = "train",
    max_length: int = 128,
    min_length: int = 1,
    short_fraction: float = 0.1,
    validation_fraction: float = 0.01,
    language: str = "en",
    word_segmenter: str | None = None,
    skip_bad_lines: bool = False,
    deduplicate: bool = False,
    near_duplicates: bool = False,
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
        input: files (.jsonl, .ndjson, .json, .txt, .text, .parquet, or .gz, .xz, .zst of it), folders with whatever of
            these they hold, patterns (`**` too), or a Hugging Face dataset (a saved folder, or NAME[:CONFIGURATION] on
            the hub). In plain text a blank line ends a document. What is found but not read is named.
        tokenizer: a folder, a hub name, or train:SIZE for a lower-casing WordPiece trained on the input.
        output: the store's folder.
        kind: blocks are independent rows; spans are those of documents with at least two (coCondenser).
        text_column: the field or column that holds the text.
        title_column: the field or column of a title, which is put before the text as a line of its own.
        id_column: the field or column, where there is one, whose repetitions are counted.
        split: of datasets; several are put together (train+test).
        max_length: tokens of a row, [CLS] and [SEP] included.
        min_length: rows with fewer tokens than this are dropped, and counted.
        short_fraction: share of the rows with a random shorter target length.
        validation_fraction: share of the documents in the validation split, chosen by a hash of their text.
        language: language of the sentence splitter, as an ISO 639-1 code.
        word_segmenter: module:function from a text to its words, for scripts without spaces (jieba:cut); otherwise
            there each token is a word.
        skip_bad_lines: count what cannot be used instead of stopping at the first.
        deduplicate: drop documents whose text, title included, was there before; they are counted in any case.
        near_duplicates: drop those too that share most of their runs of five words with one before (MinHash; needs
            the extra condenser[near]).
        append: add inputs to a finished store; what is in it stays as it is.
        seed: seed of the shorter target lengths and of the split.
        workers: processes; all cores by default. The result does not depend on it.
        shard: do one share of the work, I/N with I from 0 (--shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT).
        engine: processes of this machine, or a Ray cluster (needs the extra condenser[ray]).

    Raises:
        ValueError: unreadable input, an unsuitable tokenizer, or an output folder that holds something else.
    """
    tokenizer, folder = os.path.expanduser(tokenizer), Path(os.path.expanduser(output))
    index, count = share_of(shard)
    if engine not in ("processes", "ray"):
        raise ValueError(f"--engine {engine} must be processes or ray")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    if count > 1 and (tokenizer.startswith("train:") or engine == "ray"):
        raise ValueError(f"--shard {shard} needs a tokenizer that is there already, and --engine processes")
    if near_duplicates and find_spec("rensa") is None:
        raise ValueError("--near-duplicates needs rensa: pip install 'condenser[near]'")
    deduplicate = deduplicate or near_duplicates
    blocks = Blocks(kind, max_length, min_length, short_fraction, validation_fraction, language, word_segmenter, seed)
    inputs = [input] if isinstance(input, str | Path) else input
    columns = {"text_column": text_column, "title_column": title_column, "id_column": id_column}
    sources, left_out = resolve([str(each) for each in inputs], split, **columns)
    empty = check(sources, skip_bad_lines)  # what cannot work stops here, before anything is written
    sources = [source for source in sources if source not in empty]
    if left_out := left_out + [(source.name, "without a document") for source in empty]:
        print(in_short(left_out))
    settings: dict[str, Any] = {"tokenizer": tokenizer, "text_column": text_column, "title_column": title_column}
    settings |= {"title_prepended": title_column is not None, "id_column": id_column, **asdict(blocks)}
    settings |= {"deduplicate": deduplicate, "near_duplicates": near_duplicates}
    unit_bytes = int(np.clip(sum(source.size() for source in sources) // 512, *UNIT_BYTES))
    job = Job(folder, blocks, skip_bad_lines, deduplicate, near_duplicates)
    share = Share(sources, unit_bytes, index, count)
    settings |= {"unit_bytes": unit_bytes, "sources": [source.fingerprint for source in sources]}
    if next_state(folder, settings, append, alone=count == 1) is None:
        if (folder / UNFINISHED).is_file():  # whoever finished it was killed at once
            with at_work(folder):
                remove_leftovers(folder)
        print(f"{folder} is already prepared: nothing to do")
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with at_work(folder, shared=count > 1):
            state = next_state(folder, settings, append, alone=count == 1)
            if state is not None:  # as another process has just done it
                make(job, share, state, workers, engine)
    finally:
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def make(job: Job, share: Share, state: dict[str, Any], workers: int | None, engine: str) -> None:
    """A share of the work that is left in a ``state``, and the end of it where there is one share."""
    folder, settings, first = job.folder, state["settings"], state["first_source"]
    left = [source for source in share.sources if source.fingerprint in settings["sources"][first:]]
    numbered = [replace(source, number=number) for number, source in enumerate(left, first)]
    share = replace(share, sources=numbered, unit_bytes=settings["unit_bytes"])
    if state.pop("anew", False):
        remove(files_of_units(folder, first))
    with in_the_making(folder, state, alone=share.count == 1):
        store_tokenizer(folder, settings["tokenizer"], lambda: texts(share, job.skip_bad_lines))
        job = replace(job, tokenizer_checksum=checksum(folder / "tokenizer" / "tokenizer.json"))
        with unchanged(numbered if job.deduplicate else share.own, settings["sources"]):
            if job.deduplicate:
                everything = replace(share, index=0, count=1)
                find_repeats(job, everything, earlier_units(folder, first), workers or available_cores())
            if engine == "ray":
                do_shares_on_ray(job, share, workers)
            else:
                do_share(job, share, workers or available_cores())
        if share.count == 1:
            put_together(folder)
        else:
            about = f"share {share.index} of {share.count} is done"
            print(f"{folder}: {about}; `condenser prepare merge {folder}` when all are")


def share_of(shard: str | None) -> tuple[int, int]:
    index, _, count = ("0/1" if shard is None else shard).partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {shard}: give I/N with I from 0 to N - 1, such as 0/8")
    return int(index), int(count)


def next_state(folder: Path, settings: dict[str, Any], append: bool, alone: bool) -> dict[str, Any] | None:
    """What is kept of a store in the making: its settings, and which of its sources is the first to be done. None if
    nothing is to be done. Where another input is added than one that was not finished, what was done of that is
    removed, unless other machines may be at work on it. Raises ValueError where the folder holds something else, or a
    store of other settings or sources."""
    state = existing_state(folder)
    if state is None:
        return {"first_source": 0, "settings": settings}
    existing, finished = state["settings"], "units" in state  # which a manifest lists
    first_source = state.get("first_source", len(existing["sources"]) if append else 0)
    done = existing["sources"][:first_source]
    sources = [*done, *(each for each in settings["sources"] if not append or each not in done)]
    wanted = {"first_source": first_source, "settings": settings | existing | {"sources": sources}}
    added_anew = append and (finished or (alone and first_source > 0))
    changed = [] if sources == existing["sources"] or added_anew else ["input"]
    changed += sorted(
        key for key in settings if settings[key] != existing.get(key) and key not in ("unit_bytes", "sources")
    )
    if changed:
        raise ValueError(
            f"{folder} holds a store made with another {', '.join(changed)}; choose another --output, or remove it"
            + (" (--append adds inputs to it)" if changed == ["input"] and not append else "")
        )
    if not finished:
        return state if sources == existing["sources"] else wanted | {"anew": True}
    lost = lost_files(folder, state)
    if lost and append:
        names = " ".join(source["name"] for source in existing["sources"])
        raise ValueError(
            f"{lost[0]} is missing or damaged: first repair the store, by all its inputs ({names}) in one command "
            "without --append"
        )
    return wanted if lost or sources != existing["sources"] else None


def existing_state(folder: Path) -> dict[str, Any] | None:
    """What a folder holds: a store in the making, or a finished one's manifest, or None. ValueError if it is else."""
    others = {*folder.glob("[!.]*")} - {*partial_files(folder)}  # asked first: a share may begin, or end, meanwhile
    state: dict[str, Any] | None = None
    with suppress(FileNotFoundError):
        state = read_json(folder / UNFINISHED, "settings", "first_source")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if state and (manifest is None or manifest["settings"] != state["settings"]):
        return state
    if others and manifest is None:
        raise ValueError(f"--output {folder} is not empty and holds no token store; choose another folder")
    return manifest  # it says the same as a state where whoever wrote it was killed at once


def lost_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    others = [path(folder, unit) for unit in manifest["units"] for path in (outcome_path, keys_path)]
    others += [folder / "tokenizer", folder / "token_counts.npy", *(folder / split / "state.json" for split in SPLITS)]
    return missing_files(folder, manifest["splits"]) + [path for path in others if not path.exists()]


@contextmanager
def in_the_making(folder: Path, state: dict[str, Any], alone: bool) -> Iterator[None]:
    """Marks a folder as a store in the making, and takes that back after an error that leaves nothing to go on from,
    unless other machines may be at work there. Whatever else is in the folder stays, and all of a store that is
    repaired."""
    write_json(folder / UNFINISHED, state)
    first = state["first_source"]
    repairs = first == 0 and (folder / MANIFEST).is_file()
    try:
        yield
    except BaseException as error:
        begun = any(folder.glob(f"units/{first:05d}-*.json"))
        if alone and (isinstance(error, UselessError) or repairs or not begun):
            remove([*(() if repairs else files_of_units(folder, first)), folder / UNFINISHED])
            if not (first or repairs):
                remove([folder / name for name in ("units", "tokenizer", *SPLITS)])
        raise


@contextmanager
def unchanged(sources: list[Source], known: list[dict[str, Any]]) -> Iterator[None]:
    """Raises UselessError if a source is not the ``known`` one any more when it was read, whatever that has led to."""
    try:
        yield
    finally:
        for source in sources:
            if os.path.exists(source.name) and source.fingerprint != known[source.number]:
                raise UselessError(
                    f"{source.name} has changed while it was read: start again when nothing writes to it"
                )


def files_of_units(folder: Path, first_source: int) -> list[Path]:
    """What was made of this source and those after it, and the lists of shares."""
    patterns = "units/[0-9]*", *(f"{split}/data-*" for split in SPLITS)
    found = itertools.chain.from_iterable(map(folder.glob, patterns))
    added = [path for path in found if place(path.name) >= (first_source,)]
    return [*added, *folder.glob("units/share-*")]


def texts(share: Share, skip_bad_lines: bool) -> Iterator[str]:
    with progress(share, "training the tokenizer") as show:
        for unit in share.units():
            yield from (document.text for document in documents(unit, skip_bad_lines)[0])
            show(unit)
