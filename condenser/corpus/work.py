"""The work of `condenser prepare`: units of the input to shards of the store, by any number of processes and machines.

What becomes of a unit is a pure function of it, and its outcome (``units/UNIT.json``) is written after its shards. So
the bytes do not depend on who did the work, and an interrupted run goes on where there is no outcome yet.
"""

import gc
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from condenser.corpus.blocks import Blocks, cut_documents
from condenser.corpus.documents import documents
from condenser.corpus.encoding import Encoder
from condenser.corpus.readers import Source, Unit, units
from condenser.corpus.shards import write_shard
from condenser.corpus.words import load_segmenter
from condenser.data.store import SPLITS, missing_files, read_json, save_array, write_json

UNFINISHED = "unfinished.json"  # the settings of a store in the making; gone once the manifest says the same
BAD_NAMED = 20  # records that could not be used and are named in the manifest; all are counted


@dataclass(frozen=True)
class Job:
    """What is done with each unit."""

    folder: Path  # of the store, where its tokenizer is already
    tokenizer_checksum: str
    blocks: Blocks
    skip_bad_lines: bool


@dataclass(frozen=True)
class Share:
    """Whose units they are: those of whole sources in turn, or units in turn where there are fewer sources."""

    sources: list[Source]  # of all shares
    unit_bytes: int
    index: int = 0
    count: int = 1

    def units(self) -> Iterator[Unit]:
        whole_sources = len(self.sources) >= self.count
        for place, source in enumerate(self.sources):
            if whole_sources and place % self.count != self.index:
                continue
            for unit in units(source, self.unit_bytes):
                if whole_sources or (place + unit.number) % self.count == self.index:
                    yield unit


def do_share(job: Job, share: Share, workers: int, show_progress: bool = True) -> None:
    """Do the units that have no outcome yet, and note down which units make up the share.

    Raises:
        ValueError: unreadable input, or a process that was killed.
    """
    for name in ("units", *SPLITS):
        (job.folder / name).mkdir(parents=True, exist_ok=True)
    names = []
    with pool(job, workers) as submit, progress(share, "preparing", show_progress) as show:
        for unit in share.units():
            names.append(unit.name)
            if not is_done(job.folder, unit.name):
                submit(unit)
            show(unit)
    write_json(job.folder / "units" / f"share-{share.index}-of-{share.count}.json", names)


@contextmanager
def pool(job: Job, workers: int) -> Iterator[Callable[[Unit], None]]:
    """Gives the function that has a unit done, by another process if there are several; few wait at a time."""
    if workers == 1:
        yield partial(do_unit, job)
        return
    waiting = deque[Future]()
    executor = ProcessPoolExecutor(workers, get_context("spawn"), prepare_worker)

    def submit(unit: Unit) -> None:
        waiting.append(executor.submit(do_unit, job, unit))
        if len(waiting) > workers + 1:
            waiting.popleft().result()

    try:
        yield submit
        for future in waiting:
            future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory: the same command goes on; --workers sets how many"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def prepare_worker() -> None:
    """Make this process ready for units; it ends when the process that gives them does."""

    def end_with_parent() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores out already
    gc.disable()  # a hundred thousand short-lived tuples a document, and no cycles


@contextmanager
def progress(share: Share, doing: str, shown: bool) -> Iterator[Callable[[Unit], None]]:
    """A bar over the bytes of all sources; gives the function that moves it to the end of a unit."""
    from rich.progress import Progress

    sizes = [source.size() for source in share.sources]
    before = dict(zip(share.sources, itertools.accumulate(sizes, initial=0), strict=False))
    with Progress(disable=not shown) as bar:
        task = bar.add_task(doing, total=sum(sizes) or None)

        def show(unit: Unit) -> None:
            about = f"{doing}: {Path(unit.source.name).name}"
            bar.update(task, completed=before[unit.source] + unit.position, description=about)

        yield show


def do_unit(job: Job, unit: Unit) -> None:
    """Write a unit's shards and the hashes of its documents' ids, then its outcome."""
    good, bad = documents(unit, job.skip_bad_lines)
    encoder = load_encoder(job.folder, job.tokenizer_checksum, job.blocks.language, job.blocks.word_segmenter)
    cut, counts = cut_documents(good, encoder, job.blocks)
    token_type = "uint16" if encoder.tokenizer.get_vocab_size() <= 65536 else "uint32"
    outcome: dict[str, Any] = {"counts": {"documents": len(good) + len(bad), "bad": len(bad)} | counts}
    for split, rows in cut.items():
        outcome[split] = {"documents": rows.n_documents, "shards": []}
        if rows.n_documents:
            path = job.folder / split / f"data-{unit.name}.arrow"
            outcome[split]["shards"] = [write_shard(path, rows, token_type, job.blocks.kind == "spans")]
    path = outcome_path(job.folder, unit.name)
    save_array(path.with_suffix(".npy"), np.array([document.key for document in good], np.uint64))
    write_json(path, outcome | {"bad": bad[:BAD_NAMED]})


@lru_cache(maxsize=1)
def load_encoder(folder: Path, checksum: str, language: str, word_segmenter: str | None) -> Encoder:
    """The encoder of a store, kept for the next unit; the ``checksum`` tells its tokenizer from one before it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Encoder(tokenizer, language, load_segmenter(word_segmenter))


def is_done(folder: Path, unit: str) -> bool:
    """Whether a unit has its outcome, and its shards are still there."""
    if not outcome_path(folder, unit).is_file():
        return False
    outcome = read_json(outcome_path(folder, unit))
    return not missing_files(folder, {split: outcome[split] for split in SPLITS})


def outcome_path(folder: Path, unit: str) -> Path:
    return folder / "units" / f"{unit}.json"


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
