"""The cells of an evaluation: which encoder, fine-tuned how, is measured on what. Each is computed once."""

import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condenser.data.store import write_json
from condenser.evaluation import encoders
from condenser.evaluation.comparison import write_queries
from condenser.evaluation.finetuning import Tuning, fine_tune
from condenser.evaluation.pooling import with_pooling
from condenser.evaluation.search import BM25
from condenser.evaluation.tasks import Attention, Retrieval, Similarity, Task
from condenser.evaluation.whitening import whitened
from condenser.runs import in_words

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGES = ("accelerate", "bm25s", "PyStemmer", "pytrec-eval-terrier", "sentence-transformers", "torch", "transformers")
RANDOM = "random initialisation"
OF_A_CALL = ("model", "head_loss", "finetune")  # settings that say nothing about the encoder as it is


@dataclass(frozen=True)
class Candidate:
    """An encoder to measure; fine-tuned, if it is, once for all measurements."""

    model: str
    start: "SentenceTransformer | None" = None  # None for BM25
    pooling: str | None = None  # None is the encoder's own
    tuning: Tuning | None = None
    trained_on: Retrieval | Similarity | None = None

    @cached_property
    def fingerprint(self) -> str:
        about = encoders.describe(self.start) if self.start else BM25
        trained = self.trained_on and (self.trained_on.kind, self.trained_on.fingerprint)
        return fingerprint(self.model, about, self.pooling, self.tuning and asdict(self.tuning), trained)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The columns of the table that say which it is."""
        return {
            "model": self.model,
            "pooling": self.pooling or (self.start and encoders.pooling_of(self.start)),
            "fine_tuned": self.tuning is not None,
            "trained_on": self.trained_on and self.trained_on.name,
            "train_size": self.tuning and self.tuning.train_size,
            "seed": self.tuning and self.tuning.seed,
        }

    def prepared(self) -> "SentenceTransformer | None":
        if self.start is None:
            return None
        encoder = copy.deepcopy(self.start)
        if self.tuning:
            assert self.trained_on is not None
            fine_tune(encoder, self.trained_on.examples(self.tuning), self.trained_on.loss, self.tuning)
        return encoder


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    candidate: Candidate
    task: Task
    whitening: int | None = None  # dimensions, 0 for all
    query: str | None = None  # of --query, in the one job that answers it

    def __str__(self) -> str:
        about = self.candidate.about | {"whitening": self.whitening}
        seed = "" if about["seed"] is None else f", seed {about['seed']}"
        return f"{self.task.name}: {in_words(about)}{seed}"

    @cached_property
    def fingerprint(self) -> str:
        task = (self.task.kind, self.task.fingerprint)
        return fingerprint(self.candidate.fingerprint, task, self.whitening, self.query, versions())

    def run(self, encoder: "SentenceTransformer | None", folder: Path) -> tuple[dict[str, Any], Sequence[Any]]:
        """-> the row, and the first hits for the query if there is one"""
        if self.whitening is not None:
            assert encoder is not None
            assert not isinstance(self.task, Attention)
            encoder = whitened(encoder, self.task.texts(), self.whitening or None)
        measured = self.task.measure(encoder, self.query)
        row = {"task": self.task.kind, "collection": self.task.name, **self.candidate.about}
        row |= {"whitening": self.whitening, **measured.metrics}
        write_queries(folder, self.fingerprint, row, measured.values)
        return row, measured.hits


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def plan(
    tasks: Sequence[Task],
    encoder: "SentenceTransformer",
    tunings: Sequence[Tuning],
    poolings: Sequence[str],
    whitenings: Sequence[int],
    seeds: Sequence[int],
    baselines: bool,
    query: str | None,
) -> list[Job]:
    """The rows of the table, in order; the last encoder that searches the first collection answers the query."""
    jobs = []
    starts: dict[str | None, SentenceTransformer] = {name: with_pooling(encoder, name) for name in poolings}
    starts = starts or {None: encoder}
    drawn = [(name, seed) for name in starts for seed in seeds] if baselines else []
    twins = {(name, seed): encoders.reinitialised(starts[name], seed) for name, seed in drawn}
    for task in tasks:
        if baselines and task.kind == "retrieval":
            jobs.append(Job(Candidate("BM25"), task))
        for tuning in (None, *(tunings if task.trains else [])):
            trained_on = task if tuning and not isinstance(task, Attention) else None
            for name, start in starts.items():
                both = {"pre-trained": start}
                if baselines:
                    both = {RANDOM: twins[name, tuning.seed if tuning else seeds[0]]} | both
                for model, weights in both.items():
                    candidate = Candidate(model, weights, name, tuning, trained_on)
                    jobs += measurements(candidate, task, tasks, whitenings)
    answering = max((n for n, job in enumerate(jobs) if job.task == tasks[0] and job.candidate.start), default=None)
    if query and answering is not None and tasks[0].kind == "retrieval":
        jobs[answering] = replace(jobs[answering], query=query)
    return jobs


def measurements(candidate: Candidate, task: Task, tasks: Sequence[Task], whitenings: Sequence[int]) -> Iterator[Job]:
    """Of a candidate on its task, and if it is fine-tuned on what cannot be trained on."""
    measured = [task]
    if candidate.tuning:
        measured += [other for other in tasks if not other.trains and other.kind in (task.kind, "attention")]
    for each in measured:
        for dimensions in (None, *(whitenings if each.kind != "attention" else [])):
            yield Job(candidate, each, dimensions)


def compute(plan: list[Job], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run the jobs whose row the file lacks, rewriting it after each. -> what it is to hold

    The encoder's rows of MTEB stay in it, and all others too if there are no jobs; else what is not among these is kept
    in ``earlier/`` beside the file.
    """
    jobs = {job.fingerprint: job for job in plan}
    found: dict[str, Any] = {"settings": settings, "rows": [], "fingerprints": []}
    before = json.loads(path.read_text()) if path.exists() else found | {"settings": {}}
    same = all(before["settings"].get(name) == value for name, value in settings.items() if name not in OF_A_CALL)
    if same and not jobs:
        return before
    kept = {"mteb": before["mteb"]} if same and "mteb" in before else {}
    back = set_aside(path.parent, jobs.keys())
    back = {mark: row for mark, row in back.items() if not jobs[mark].query}  # its hits were not kept
    known = back | dict(zip(before["fingerprints"], before["rows"], strict=True))
    rows = {mark: known[mark] for mark in jobs if mark in known}
    example = before.get("example") if any(jobs[mark].query for mark in rows) else None
    ready: tuple[str, Any] = ("", None)  # a candidate's fingerprint, the encoder
    for number, (mark, job) in enumerate(jobs.items(), start=1):
        print(f"{number}/{len(jobs)} {job}{': as before' if mark in rows else ''}")
        if mark not in rows:
            if ready[0] != job.candidate.fingerprint:
                ready = job.candidate.fingerprint, job.candidate.prepared()
            rows[mark], hits = job.run(ready[1], path.parent)
            example = {"query": job.query, "answered_by": str(job), "hits": hits} if hits else example
        marks = [mark for mark in jobs if mark in rows]
        found |= {"rows": [rows[mark] for mark in marks], "fingerprints": marks, **kept}
        found |= {"example": example} if example else {}
        write_json(path, found)
    return found


def set_aside(folder: Path, asked: Collection[str]) -> dict[str, Any]:
    """Files of ``queries/`` that are not asked for go to ``earlier/``. -> by fingerprint the rows that come back"""
    queries, earlier = folder / "queries", folder / "earlier"
    for source, target, here in (queries, earlier, False), (earlier, queries, True):
        for file in source.glob("*.json"):
            if (file.stem in asked) == here:
                target.mkdir(exist_ok=True)
                file.rename(target / file.name)
    return {file.stem: json.loads(file.read_text())["row"] for file in queries.glob("*.json")}


def versions() -> dict[str, str]:
    """Of the packages that are needed, as numbers depend on them."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as missing:
        raise ImportError(f"evaluation needs {missing.name}: pip install 'condenser[eval]'") from None
