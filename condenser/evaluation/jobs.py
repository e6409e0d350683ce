"""The rows of an evaluation: which encoder, fine-tuned how, is measured on what. Each is computed once."""

import copy
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condenser.data.store import write_json
from condenser.evaluation import encoders
from condenser.evaluation.encoders import Encoder
from condenser.evaluation.finetuning import Tuning, fine_tune
from condenser.evaluation.pooling import whitened, with_pooling
from condenser.evaluation.retrieval import UNSEEN, Collection
from condenser.evaluation.search import BM25
from condenser.evaluation.tasks import Attention, Task, Trainable
from condenser.runs import in_words, read_mapping

PACKAGES = ("accelerate", "bm25s", "PyStemmer", "pytrec-eval-terrier", "sentence-transformers", "torch", "transformers")
RANDOM = "random initialisation"
ROWS = "rows"  # folder of a file for each row: the row, the values of its queries or pairs, and hits of --query
LEARNING_RATES = (2e-5, 1e-4, 5e-4)  # tried where one is to be chosen,
SIMILARITIES = ("cosine", "dot")  # for retrieval with each of these


class Ready(NamedTuple):
    encoder: Encoder
    about: dict[str, Any]  # how it computes, compares and was fine-tuned
    vectors: dict[str, np.ndarray]  # of a task's texts, by its fingerprint, once whitening needs them


@dataclass(frozen=True)
class Candidate:
    """An encoder to measure; fine-tuned, if it is, once for all measurements."""

    base: Encoder
    base_mark: str  # what identifies `base`
    pooling: str | None = None  # None is the encoder's own
    drawn: int | None = None  # seed of random weights
    tuning: Tuning | None = None
    trained_on: Trainable | None = None

    @cached_property
    def fingerprint(self) -> str:
        trained = self.trained_on and (self.trained_on.kind, self.trained_on.fingerprint)
        grid = (LEARNING_RATES, SIMILARITIES) if self.tuning and self.tuning.learning_rate is None else ()
        tuning = self.tuning and asdict(self.tuning)
        return fingerprint(self.base_mark, self.pooling, self.drawn, tuning, trained, grid)

    @property
    def about(self) -> dict[str, Any]:
        """The columns of the table that say which it is."""
        return {
            "model": "pre-trained" if self.drawn is None else RANDOM,
            "pooling": self.pooling or encoders.pooling_of(self.base),
            "fine_tuned": self.tuning is not None,
            "trained_on": self.trained_on and self.trained_on.name,
            "train_size": self.tuning and self.tuning.train_size,
            "pair_loss": self.tuning and self.tuning.pair_loss,
            "seed": self.tuning.seed if self.tuning else self.drawn,
        }

    def start(self) -> Encoder:
        start = with_pooling(self.base, self.pooling) if self.pooling else copy.deepcopy(self.base)
        return start if self.drawn is None else encoders.reinitialised(start, self.drawn)

    def prepared(self, folder: Path) -> Ready:
        encoder, tuning, tuned = self.start(), self.tuning, dict[str, Any]()
        if tuning:
            assert self.trained_on is not None
            if tuning.learning_rate is None:
                choice = self.chosen(folder)
                tuning = replace(tuning, learning_rate=choice["learning_rate"])
                encoder.similarity_fn_name = choice["similarity"]
            tuned = fine_tune(encoder, self.trained_on.examples(tuning), tuning)
        about = {"similarity": encoder.similarity_fn_name, "max_length": encoder.max_seq_length}
        return Ready(encoder, about | {"dtype": encoders.precision(encoder)} | tuned, {})

    def chosen(self, folder: Path) -> dict[str, Any]:
        """The learning rate, and for retrieval the similarity, that score best on held-out training questions or pairs.

        Chosen once for all seeds of an encoder, pooling, collection and size, and kept in the output folder.
        """
        assert self.tuning is not None
        assert self.trained_on is not None
        part = self.trained_on.held_out()
        once = replace(self, tuning=replace(self.tuning, seed=0), drawn=None if self.drawn is None else 0)
        path = folder / "choices" / f"{fingerprint(once.fingerprint, versions())}.json"
        if kept := read_kept(path):
            return kept
        ranks = isinstance(part, Collection)
        similarities: Any = SIMILARITIES if ranks else [self.base.similarity_fn_name]
        size = self.tuning.train_size and min(self.tuning.train_size, part.n_train)
        tried = []
        for rate, similarity in itertools.product(LEARNING_RATES, similarities):
            encoder, tuning = once.start(), replace(self.tuning, learning_rate=rate, train_size=size, seed=0)
            encoder.similarity_fn_name = similarity
            setting = f"{rate:g}, {similarity}" if ranks else f"{rate:g}"
            fine_tune(encoder, part.examples(tuning), tuning)
            try:
                found = part.measure(encoder).metrics
            except ValueError as error:  # it came to vectors that are not finite
                print(f"  tried {setting}: {error}")
                continue
            metric = (UNSEEN if found["queries_unseen"] else "ndcg@10") if ranks else "spearman"
            value = found[metric]
            if value is None:
                print(f"  tried {setting}: there is no {metric}, as all cosines are alike")
                continue
            print(f"  tried {setting}: {metric} {value:.4f} on what was held out of training")
            tried.append({"learning_rate": rate, "similarity": encoder.similarity_fn_name, "score": value})
        if not tried:
            raise ValueError(f"{self.trained_on.name}: no learning rate came to anything; give one, or other examples")
        best = max(tried, key=lambda each: each["score"])
        path.parent.mkdir(exist_ok=True)
        write_json(path, best | {"tried": tried})
        return best


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    candidate: Candidate | None  # None for BM25
    task: Task
    whitening: int | None = None  # dimensions, 0 for all
    query: str | None = None  # of --query, in the one job that answers it
    reader: Encoder | None = None  # whose length BM25 keeps to

    @property
    def about(self) -> dict[str, Any]:
        if self.candidate:
            return self.candidate.about | {"whitening": self.whitening}
        read = f"first {self.reader.max_seq_length} tokens" if self.reader else "whole texts"
        nothing = dict.fromkeys(("pooling", "trained_on", "train_size", "pair_loss", "seed", "whitening"))
        return nothing | {"model": f"BM25, {read}", "fine_tuned": False}

    def __str__(self) -> str:
        seed = self.about["seed"]
        return f"{self.task.name}: {in_words(self.about)}{'' if seed is None else f', seed {seed}'}"

    @cached_property
    def fingerprint(self) -> str:
        read = self.reader and fingerprint(encoders.describe(self.reader))
        model = self.candidate.fingerprint if self.candidate else (BM25, read)
        return fingerprint(model, self.task.kind, self.task.fingerprint, self.whitening, self.query, versions())

    def run(self, ready: Ready | None) -> dict[str, Any]:
        """With what `Candidate.prepared` gave, None for BM25. -> the file of the row"""
        task: Any = self.task
        if ready is None:
            how, measured = dict[str, Any](), task.measure_bm25(self.reader)
        else:
            encoder, how, vectors = ready
            if self.whitening is not None:
                if task.fingerprint not in vectors:
                    vectors[task.fingerprint] = encoders.encoded(encoder, task.texts(), task.texts_are).cpu().numpy()
                encoder = whitened(encoder, vectors[task.fingerprint], self.whitening or None)
            measured = task.measure(encoder, self.query)
        row = {"task": task.kind, "collection": task.name, **self.about, **how, **measured.metrics}
        return {"row": row, "values": measured.values, "hits": measured.hits}


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def plan(
    tasks: Sequence[Task],
    base: Encoder,
    tunings: Sequence[Tuning],
    poolings: Sequence[str | None],
    whitenings: Sequence[int],
    drawn: Sequence[int],
    query: str | None,
) -> list[Job]:
    """The rows of the table, in order; the last encoder that searches the first collection answers the query. With
    seeds that are ``drawn`` also BM25 and random weights: of these, or of fine-tuning's."""
    mark, jobs = fingerprint(encoders.describe(base)), list[Job]()
    for task in tasks:
        if drawn and isinstance(task, Collection):
            jobs.append(Job(None, task))
            if base.max_seq_length and base.tokenizer.is_fast:
                jobs.append(Job(None, task, reader=base))
        pooled = [None] if isinstance(task, Attention) else poolings  # which is the same by any
        for tuning, pooling in itertools.product((None, *(tunings if task.trains else [])), pooled):
            measured, trained_on = [task], None
            if tuning and not isinstance(task, Attention):
                trained_on, kinds = task, (task.kind, Attention.kind)
                measured += [other for other in tasks if not other.trains and other.kind in kinds]
                tuning = replace(tuning, pair_loss=None) if isinstance(task, Collection) else tuning
            for seed in [*([tuning.seed] if tuning and drawn else drawn), None]:
                candidate = Candidate(base, mark, pooling, seed, tuning, trained_on)
                for each in measured:
                    dimensions = () if isinstance(each, Attention) else whitenings
                    jobs += [Job(candidate, each, whitening) for whitening in (None, *dimensions)]
    answering = [n for n, job in enumerate(jobs) if job.task is tasks[0] and job.candidate]
    if query and isinstance(tasks[0], Collection):
        jobs[answering[-1]] = replace(jobs[answering[-1]], query=query)
    return jobs


def compute(jobs: list[Job], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run the jobs that have no file in ``rows/`` beside ``path``, which is rewritten after each. -> what it holds"""
    found: dict[str, Any] = {"settings": settings, "rows": [], "fingerprints": []}
    jobs = list({job.fingerprint: job for job in jobs}.values())
    ready: tuple[str, Any] = ("", None)  # a candidate's fingerprint, what it has prepared
    for number, job in enumerate(jobs, start=1):
        file = path.parent / ROWS / f"{job.fingerprint}.json"
        kept = read_kept(file)
        print(f"{number}/{len(jobs)} {job}{': as before' if kept else ''}")
        if not kept:
            mark = job.candidate.fingerprint if job.candidate else ""
            if ready[0] != mark:
                ready = mark, job.candidate.prepared(path.parent) if job.candidate else None
            file.parent.mkdir(exist_ok=True)
            kept = job.run(ready[1])
            write_json(file, kept)
        found["rows"].append(kept["row"])
        found["fingerprints"].append(job.fingerprint)
        if job.query:
            found["example"] = {"query": job.query, "answered_by": str(job), "hits": kept["hits"]}
        write_json(path, found)
    return found


def read_kept(file: Path) -> dict[str, Any]:
    """The file of a row; nothing if it is not there, or damaged, and so to be computed again."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def read_rows(folder: Path) -> list[tuple[dict[str, Any], dict[str, dict[str, float]]]]:
    """Of the last call that wrote there: rows, and the values of each one's queries or pairs."""
    marks = (read_mapping(folder / "results.json") or {}).get("fingerprints", [])
    try:
        files = [read_kept(folder / ROWS / f"{mark}.json") for mark in marks]
        return [(file["row"], file["values"]) for file in files]
    except (KeyError, TypeError):
        message = f"{folder / ROWS} lacks rows, or they are damaged: run the same `condenser evaluate` again"
        raise ValueError(message) from None


def versions() -> dict[str, str]:
    """Of the packages that are needed, as numbers depend on them."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as missing:
        raise ImportError(f"evaluation needs {missing.name}: pip install 'condenser[eval]'") from None
