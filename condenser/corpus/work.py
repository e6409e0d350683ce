"""The work of `condenser prepare`: units of the input to shards of the store, by any number of processes and machines.

What becomes of a unit is a pure function of it, and its outcome (``units/UNIT.json``) is written after its shards. So
the bytes do not depend on who did the work, and an interrupted run goes on where there is no outcome yet.
"""

import gc
import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from condenser.corpus.blocks import Blocks, cut_documents
from condenser.corpus.documents import documents
from condenser.corpus.encoding import Encoder
from condenser.corpus.readers import Source, Unit, units
from condenser.corpus.repeats import keys_of, mark_repeats
from condenser.corpus.shards import write_shard
from condenser.corpus.words import load_segmenter
from condenser.data.lock import locked
from condenser.data.store import SPLITS, load_array, missing_files, read_json, save_array, write_json

UNFINISHED = "unfinished.json"  # the settings of a store in the making; gone once the manifest says the same
BAD_NAMED = 20  # records that could not be used and are named in the manifest; all are counted


@dataclass(frozen=True)
class Job:
    """What is done with each unit."""

    folder: Path  # of the store
    blocks: Blocks
    skip_bad_lines: bool
    deduplicate: bool
    near_duplicates: bool
    tokenizer_checksum: str = ""  # once the store has its tokenizer


@dataclass(frozen=True)
class Share:
    """Whose units they are: those of whole sources in turn, or units in turn where there are fewer sources."""

    sources: list[Source]  # of all shares
    unit_bytes: int
    index: int = 0
    count: int = 1

    @property
    def own(self) -> list[Source]:  # that some of its units are of
        return self.sources[self.index :: self.count] if len(self.sources) >= self.count else self.sources

    def units(self) -> Iterator[Unit]:
        whole_sources = len(self.sources) >= self.count
        for place, source in enumerate(self.own):
            for unit in units(source, self.unit_bytes):
                if whole_sources or (place + unit.number) % self.count == self.index:
                    yield unit


def do_share(job: Job, share: Share, workers: int, show_progress: bool = True) -> None:
    """Do the units that have no outcome yet, and note down which units make up the share. Raises ValueError for
    unreadable input, or a process that was killed."""
    for name in ("units", *SPLITS):
        (job.folder / name).mkdir(parents=True, exist_ok=True)
    names = each_unit(partial(do_unit, job), share, partial(is_done, job.folder), workers, "preparing", show_progress)
    write_json(job.folder / "units" / f"share-{share.index}-of-{share.count}.json", names)


def do_shares_on_ray(job: Job, everything: Share, count: int | None = None) -> None:
    """Do ``count`` shares, by default one for each CPU, in tasks of the cluster that Ray is connected to. The input and
    the store must be reachable under the same path on every node."""
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'condenser[ray]'") from None

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    count = count or int(ray.cluster_resources()["CPU"])
    job = replace(job, folder=job.folder.resolve())  # Ray's workers have a folder of their own
    sources = [
        source if source.kind == "hub" else replace(source, name=str(Path(source.name).resolve()))
        for source in everything.sources
    ]
    shares = [replace(everything, sources=sources, index=index, count=count) for index in range(count)]
    task = ray.remote(do_share)
    try:
        ray.get([task.remote(job, share, workers=1, show_progress=False) for share in shares])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def find_repeats(job: Job, everything: Share, earlier: list[str], workers: int) -> None:
    """Note down for each unit which of its documents repeat one before, in the units ``earlier`` too. Every machine
    that does a share does this for all of them: to read and hash takes a small part of the time."""
    (job.folder / "units").mkdir(exist_ok=True)

    def has_keys(name: str) -> bool:
        return keys_path(job.folder, name).is_file()

    names = each_unit(partial(write_keys, job), everything, has_keys, workers, "looking for repeats")
    keys = [keys_path(job.folder, name) for name in (*earlier, *names)]
    mark_repeats(keys, [repeats_path(job.folder, name) for name in names])


def write_keys(job: Job, unit: Unit) -> None:
    good, _ = documents(unit, job.skip_bad_lines)
    save_array(keys_path(job.folder, unit.name), keys_of(good, job.near_duplicates))


def each_unit(
    work: Callable[[Unit], None],
    share: Share,
    is_done: Callable[[str], bool],
    workers: int,
    doing: str,
    shown: bool = True,
) -> list[str]:
    """Do the units of a share that are not done; gives the names of all."""
    names = []
    with pool(work, workers) as submit, progress(share, doing, shown) as show:
        for unit in share.units():
            names.append(unit.name)
            if not is_done(unit.name):
                submit(unit)
            show(unit)
    return names


@contextmanager
def pool(work: Callable[[Unit], None], workers: int) -> Iterator[Callable[[Unit], None]]:
    """Gives the function that has a unit done, by another process if there are several; few wait at a time."""
    if workers == 1:
        yield work
        return
    waiting = deque[Future]()
    executor = ProcessPoolExecutor(workers, get_context("spawn"), prepare_worker)

    def submit(unit: Unit) -> None:
        with without_main():
            waiting.append(executor.submit(work, unit))
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


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that begin here do not run the script that is being run, in which they need nothing: it would have to
    keep its own work behind ``if __name__ == "__main__"``."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def prepare_worker() -> None:
    """Make this process ready for units; it ends when the process that gives them does."""

    def end_with_parent() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores out already
    gc.disable()  # a hundred thousand short-lived tuples a document, and no cycles


@contextmanager
def progress(share: Share, doing: str, shown: bool = True) -> Iterator[Callable[[Unit], None]]:
    """A bar over the bytes of all sources; gives the function that moves it to the end of a unit."""
    from rich.progress import Progress, TextColumn

    sizes = [source.size() for source in share.sources]
    before = dict(zip(share.sources, itertools.accumulate(sizes, initial=0), strict=False))
    text = TextColumn("{task.description}", markup=False)  # names of files are no markup
    with Progress(text, *Progress.get_default_columns()[1:], disable=not shown) as bar:
        task = bar.add_task(doing, total=sum(sizes) or None)

        def show(unit: Unit) -> None:
            about = f"{doing}: {Path(unit.source.name).name}"
            bar.update(task, completed=before[unit.source] + unit.position, description=about)

        yield show


def do_unit(job: Job, unit: Unit) -> None:
    """Write a unit's shards and the hashes of its documents, then its outcome."""
    good, bad = documents(unit, job.skip_bad_lines)
    repeats = load_array(repeats_path(job.folder, unit.name)) if job.deduplicate else np.zeros(len(good), bool)
    encoder = load_encoder(job)
    kept = [document for document, is_repeat in zip(good, repeats, strict=True) if not is_repeat]
    try:
        cut, counts = cut_documents(kept, encoder, job.blocks)
    except ValueError as error:
        raise ValueError(f"{unit.source.name}, from line or row {unit.first} on: {error}") from error
    token_type = "uint16" if encoder.n_ids <= 65536 else "uint32"
    of_documents = {"documents": len(good) + len(bad), "bad": len(bad), "dropped_repeats": len(good) - len(kept)}
    outcome: dict[str, Any] = {"counts": of_documents | counts}
    for split, rows in cut.items():
        outcome[split] = {"documents": rows.n_documents, "shards": []}
        if rows.n_documents:
            path = job.folder / split / f"data-{unit.name}.arrow"
            outcome[split]["shards"] = [write_shard(path, rows, token_type, job.blocks.kind == "spans")]
    if not job.deduplicate:  # else they are there
        save_array(keys_path(job.folder, unit.name), keys_of(good, near=False))
    write_json(outcome_path(job.folder, unit.name), outcome | {"bad": bad[:BAD_NAMED]})


@lru_cache(maxsize=1)
def load_encoder(job: Job) -> Encoder:
    """The encoder of a store, kept for the next unit; the checksum tells its tokenizer from one before it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.folder / "tokenizer" / "tokenizer.json"))
    return Encoder(tokenizer, job.blocks.language, load_segmenter(job.blocks.word_segmenter))


def is_done(folder: Path, unit: str) -> bool:
    """Whether a unit has its outcome, and its shards and keys are still there."""
    if not (outcome_path(folder, unit).is_file() and keys_path(folder, unit).is_file()):
        return False
    outcome = read_outcome(folder, unit)
    return not missing_files(folder, {split: outcome[split] for split in SPLITS})


def read_outcome(folder: Path, unit: str) -> dict[str, Any]:
    return read_json(outcome_path(folder, unit), "counts", "bad", *SPLITS)


def at_work(folder: Path, shared: bool = False) -> AbstractContextManager[None]:
    """Holds a store's lock: several shares hold it together, everything else alone."""
    return locked(folder / ".lock", f"{folder} is being made by {{holder}}: wait for its end, or stop it", shared)


def outcome_path(folder: Path, unit: str) -> Path:
    return folder / "units" / f"{unit}.json"


def keys_path(folder: Path, unit: str) -> Path:
    """Of the keys of all documents (see repeats.py)."""
    return folder / "units" / f"{unit}.npy"


def repeats_path(folder: Path, unit: str) -> Path:
    return folder / "units" / f"{unit}.repeats.npy"


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
