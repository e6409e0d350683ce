"""The work of `condenser prepare`: units of the input to shards of the store, by any number of processes and machines.

What becomes of a unit is a pure function of it, and a unit's record (``units/SOURCE-NUMBER.json``) is written after its
shards. So the bytes do not depend on who did the work, and an interrupted run goes on where there is no record yet.
"""

import gc
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from condenser.corpus.blocks import Blocks, cut_documents
from condenser.corpus.documents import Document, documents
from condenser.corpus.encoding import Encoder
from condenser.corpus.readers import Columns, Source, Unit, units
from condenser.corpus.shards import write_shard
from condenser.corpus.words import load_segmenter
from condenser.data.store import SPLITS, missing_files, read_json, save_array, write_json

UNFINISHED = "unfinished.json"  # the settings of a store in the making; gone once the manifest says the same
BAD_NAMED = 20  # records that could not be used and are named in the manifest; all are counted


@dataclass(frozen=True)
class Job:
    """What every process needs to know."""

    folder: Path
    sources: list[Source]
    first_source: int  # the number of sources[0] in the store
    columns: Columns
    blocks: Blocks
    unit_bytes: int
    skip_bad_lines: bool


def do_share(job: Job, index: int, count: int, workers: int, progress: bool = True) -> None:
    """Do share ``index`` of ``count``: whole sources in turn, or units in turn where there are fewer sources.

    Raises:
        ValueError: unreadable input, or a process that was killed.
    """
    results: list[str] = []
    for name in ("units", *SPLITS):
        (job.folder / name).mkdir(parents=True, exist_ok=True)
    with pool(job, workers) as submit, reading(job, "preparing", progress) as read:
        for place, source in enumerate(job.sources):
            for unit in units(source, job.columns, job.unit_bytes):
                if (place if len(job.sources) >= count else place + unit.number) % count == index:
                    results.append(f"{job.first_source + place:05d}-{unit.number:05d}")
                    if not is_done(job, results[-1]):
                        submit(results[-1], source, unit)
                read(place, unit.position)
    write_json(job.folder / "units" / f"share-{index}-of-{count}.json", results)


@contextmanager
def pool(job: Job, workers: int) -> Iterator[Any]:
    """Gives the function that has a unit done, by another process if there are several; few wait at a time."""
    if workers == 1:
        load_job(job)
        yield do_unit
        return
    waiting = deque[Future]()
    executor = ProcessPoolExecutor(workers, get_context("spawn"), load_worker, (job, os.getpid()))

    def submit(*unit: Any) -> None:
        waiting.append(executor.submit(do_unit, *unit))
        while len(waiting) > workers + 1:
            waiting.popleft().result()

    try:
        yield submit
        while waiting:
            waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory: the same command goes on; --workers sets how many"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def reading(job: Job, doing: str, progress: bool) -> Iterator[Any]:
    """A progress bar over the bytes read of all sources; gives the function that moves it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    before = np.cumsum([0, *(source.size() for source in job.sources)])
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(doing, total=int(before[-1]) or None)

        def read(place: int, position: int) -> None:
            about = f"{doing}: {Path(job.sources[place].name).name} ({place + 1} of {len(job.sources)})"
            bar.update(task, completed=int(before[place]) + position, description=about)

        yield read


def load_worker(job: Job, parent: int) -> None:
    """Make this process ready for units; it ends when the process that gives them does."""

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores out already
    gc.disable()  # a hundred thousand short-lived tuples a document, and no cycles
    load_job(job)


def load_job(job: Job) -> None:
    global JOB, ENCODER
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.folder / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    JOB, ENCODER = job, Encoder(tokenizer, job.blocks.language, load_segmenter(job.blocks.word_segmenter))


JOB: Job  # what the units of this process share: set by `load_job`
ENCODER: Encoder


def do_unit(name: str, source: Source, unit: Unit) -> None:
    """Write one unit's shards and the hashes of its documents' ids, then its record."""
    usable, bad = [], []
    for document in documents(unit, source, JOB.columns):
        if isinstance(document, Document):
            usable.append(document)
        elif JOB.skip_bad_lines:
            bad.append(str(document))
        else:
            raise ValueError(f"{document} (--skip-bad-lines goes on)")
    cut, counts = cut_documents(usable, ENCODER, JOB.blocks)
    token_type = "uint16" if ENCODER.tokenizer.get_vocab_size() <= 65536 else "uint32"
    record: dict[str, Any] = {"counts": {"documents": len(usable) + len(bad), "bad": len(bad)} | counts}
    for split, rows in cut.items():
        record[split] = {"documents": rows.n_documents, "shards": []}
        if rows.tokens:
            path = JOB.folder / split / f"data-{name}.arrow"
            tokens, starts = np.concatenate(rows.tokens), np.concatenate(rows.word_starts)
            documents_of_rows = np.array(rows.documents) if JOB.blocks.kind == "spans" else None
            known = write_shard(path, tokens, starts, np.array(rows.lengths), token_type, documents_of_rows)
            record[split]["shards"] = [known]
    save_array(record_path(JOB, name).with_suffix(".npy"), np.array([document.key for document in usable], np.uint64))
    write_json(record_path(JOB, name), record | {"bad": bad[:BAD_NAMED]})


def is_done(job: Job, name: str) -> bool:
    """Whether a unit has its record, and its shards are still there."""
    if not record_path(job, name).is_file():
        return False
    record = read_record(job.folder, name)
    return not missing_files(job.folder, {split: record[split] for split in SPLITS})


def record_path(job: Job, name: str) -> Path:
    return job.folder / "units" / f"{name}.json"


def read_record(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / "units" / f"{name}.json")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
