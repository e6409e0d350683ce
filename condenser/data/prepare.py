"""`condenser prepare`: text in, token store out (blocks.py says how documents are cut, store.py what is written).

Documents are read in order and grouped into units of about 8 million characters. A unit is turned into one shard of
each split by a pure function, in as many processes as asked for, so the bytes do not depend on how many there were,
and an interrupted run goes on with the units that are missing.
"""

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from condenser.data import corpus
from condenser.data.blocks import Blocks, cut_documents
from condenser.data.store import (
    MANIFEST,
    SPLITS,
    Shard,
    dataset_files,
    shard_table,
    tokenizer_hash,
    write_json,
    write_table,
)
from condenser.data.tokenizers import load_tokenizer, obtain_tokenizer

UNIT_CHARACTERS = 8_000_000
WORKER: tuple[Path, Blocks, Any, str]  # what the units of this process share: set by `load_worker`
UNFINISHED = "unfinished.json"  # the settings of a store in the making; gone once the manifest is there


def prepare(
    *,
    input: list[str],
    tokenizer: str,
    output: str,
    text_column: str = "text",
    max_length: int = 128,
    min_length: int = 1,
    short_fraction: float = 0.1,
    validation_fraction: float = 0.01,
    language: str = "en",
    skip_bad_lines: bool = False,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Turn text into a token store.

    Documents are cut into blocks of whole sentences of up to --max-length tokens; a sentence that is longer goes on in
    the next block. The same command on an unfinished store goes on where it stopped, on a finished one does nothing.

    Args:
        input: files (.jsonl, .parquet, .txt; .gz, .xz or .zst of them), folders, glob patterns, or a Hugging Face
            dataset (a saved folder, or NAME[:CONFIGURATION] on the hub). In plain text a blank line ends a document.
        tokenizer: a folder, a hub name, or train:SIZE for a lower-casing WordPiece trained on the input.
        output: the store's folder.
        text_column: the field or column that holds the text.
        max_length: tokens of a block, [CLS] and [SEP] included.
        min_length: blocks with fewer tokens than this are dropped, and counted.
        short_fraction: share of the blocks with a random shorter target length.
        validation_fraction: share of the documents in the validation split, chosen by a hash of their text.
        language: language of the sentence splitter, as an ISO 639-1 code.
        skip_bad_lines: count unreadable lines instead of stopping at the first.
        seed: seed of the shorter target lengths and of the split.
        workers: processes; all cores by default. The result does not depend on it.

    Raises:
        ValueError: unreadable input, an unsuitable tokenizer, or an output folder that holds something else.
    """
    blocks = Blocks(max_length, min_length, short_fraction, validation_fraction, language, seed)
    sources = corpus.resolve(input)
    settings = {"tokenizer": tokenizer, "text_column": text_column, **asdict(blocks)}
    settings["sources"] = [source.fingerprint() for source in sources]
    folder = Path(output)
    if finished(folder, settings):
        print(f"{output} is already prepared: nothing to do")
        return

    def texts(counts: Counter, wrap: corpus.Wrap) -> Iterator[str]:
        return corpus.documents(sources, text_column, skip_bad_lines, counts, wrap)

    next(texts(Counter(), lambda file, size, name: file))  # an unreadable input stops here, before anything is written
    made = begin(folder, settings)
    try:
        made_tokenizer = store_tokenizer(folder, tokenizer, texts)
        counts: Counter = Counter()
        with reading("cutting into blocks") as wrap:
            stats = run_units(folder, blocks, texts(counts, wrap), workers or available_cores())
    except BaseException:
        if made and not list(folder.glob("units/*.json")):
            shutil.rmtree(folder)  # nothing to go on from: leave no trace
        raise
    manifest = finish(folder, settings, made_tokenizer, stats, counts)
    print(summary(output, manifest))


def finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the store is complete. Raises ValueError where the folder holds anything but this store in the making."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not folder.is_dir():
        raise ValueError(f"--output {folder} is a file")
    for name in (MANIFEST, UNFINISHED):
        if (folder / name).is_file():
            written = json.loads((folder / name).read_text())["settings"]
            changed = sorted(key for key in settings if settings[key] != written.get(key))
            if changed:
                raise ValueError(
                    f"{folder} holds a store made with another {', '.join(changed)}; "
                    "choose another --output, or remove it"
                )
            return name == MANIFEST
    raise ValueError(f"--output {folder} is not empty and holds no token store; choose another folder")


def begin(folder: Path, settings: dict[str, Any]) -> bool:
    """Mark the folder as a store in the making; true if it was not one yet."""
    if (folder / UNFINISHED).is_file():
        return False
    for name in ("units", *SPLITS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_json(folder / UNFINISHED, {"settings": settings})
    return True


def store_tokenizer(folder: Path, spec: str, texts: Callable) -> Any:
    """The store's tokenizer, obtained the first time and read back when an unfinished store goes on."""
    place = folder / "tokenizer"
    if not place.exists():
        with reading("training the tokenizer") as wrap:
            tokenizer = obtain_tokenizer(spec, lambda: texts(Counter(), wrap))
        partial = folder / "tokenizer.partial"
        tokenizer.save_pretrained(partial)
        partial.rename(place)
    return load_tokenizer(place)


@contextmanager
def reading(doing: str) -> Iterator[corpus.Wrap]:
    """A progress bar over the bytes read of each input file; gives the function that puts a file behind it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        yield lambda file, size, name: progress.wrap_file(file, total=size, description=f"{name}: {doing}")


def run_units(folder: Path, blocks: Blocks, texts: Iterator[str], workers: int) -> list[dict[str, Any]]:
    """Write the shards of every unit that is not there yet; the statistics of all units, in order."""
    todo = enumerate(units(texts))
    if workers == 1:
        load_worker(folder, blocks)
        return [do_unit(number, unit) for number, unit in todo]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores out already
    results, waiting = [], deque[Future]()
    with ProcessPoolExecutor(workers, get_context("spawn"), load_worker, (folder, blocks)) as pool:
        for number, unit in todo:
            waiting.append(pool.submit(do_unit, number, unit))
            if len(waiting) > 2 * workers:  # few units in memory at a time
                results.append(waiting.popleft().result())
        results += [future.result() for future in waiting]
    return results


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def units(texts: Iterator[str]) -> Iterator[list[str]]:
    unit, size = [], 0
    for text in texts:
        unit.append(text)
        size += len(text)
        if size >= UNIT_CHARACTERS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def load_worker(folder: Path, blocks: Blocks) -> None:
    """Give this process what its units share."""
    global WORKER
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    token_type = "uint16" if tokenizer.get_vocab_size() <= 65536 else "uint32"
    WORKER = folder, blocks, tokenizer, token_type


def do_unit(number: int, texts: list[str]) -> dict[str, Any]:
    """Write one unit's shards, then its statistics, whose presence says that the unit is done."""
    folder, blocks, tokenizer, token_type = WORKER
    record = folder / "units" / f"{number:05d}.json"
    if record.is_file():
        return json.loads(record.read_text())
    cut, stats = cut_documents(texts, tokenizer, blocks)
    for split, (ids, starts) in cut.items():
        if ids:
            name = f"data-{number:05d}.arrow"
            write_table(folder / split / name, shard_table(ids, starts, token_type))
            stats[split]["shard"] = {"file": name, "rows": len(ids), "tokens": sum(map(len, ids))}
    write_json(record, stats)
    return stats


def finish(folder: Path, settings: dict, tokenizer: Any, stats: list[dict], counts: Counter) -> dict[str, Any]:
    """Make each split a `datasets` folder, count tokens, write the manifest and remove the traces of the work."""
    splits = {}
    for split in SPLITS:
        shards = [unit[split]["shard"] for unit in stats if "shard" in unit[split]]
        splits[split] = {
            "documents": sum(unit[split]["documents"] for unit in stats),
            "blocks": sum(shard["rows"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "shards": shards,
        }
        dataset_files(folder / split, shards)
    totals = ("documents", "empty_documents", "blocks_dropped", "tokens_kept", "tokens_dropped")
    manifest = {
        "settings": settings,
        "tokenizer": {"hash": tokenizer_hash(tokenizer), "vocabulary": len(tokenizer)},
        "counts": {name: sum(unit[name] for unit in stats) for name in totals} | {"bad_lines": counts["bad"]},
        "splits": splits,
    }
    counts_by_id = np.zeros(len(tokenizer), np.int64)
    for shard in splits["train"]["shards"]:
        with pa.memory_map(str(folder / "train" / shard["file"])) as file:
            tokens = Shard(pa.ipc.open_stream(file).read_all()).tokens
            counts_by_id += np.bincount(tokens, minlength=len(tokenizer))
    np.save(folder / "token_counts.npy", counts_by_id)
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / "units")
    (folder / UNFINISHED).unlink()
    return manifest


def summary(output: str, manifest: dict[str, Any]) -> str:
    counts, splits = manifest["counts"], manifest["splits"]
    train, validation = splits["train"], splits["validation"]
    lines = [
        f"{output}: {train['blocks']:,} blocks, {train['tokens']:,} tokens for training; "
        f"{validation['blocks']:,} blocks for validation",
        f"{counts['documents']:,} documents ({counts['empty_documents']:,} empty), {counts['bad_lines']:,} bad lines; "
        f"{counts['tokens_kept']:,} tokens kept, {counts['tokens_dropped']:,} dropped",
    ]
    if not validation["blocks"]:
        lines.append(
            "no document fell into the validation split: raise --validation-fraction to validate during training"
        )
    return "\n".join(lines)
