"""The command `condenser evaluate`: retrieval, similarity and probes of an encoder, as it is and fine-tuned.

    condenser evaluate runs/demo/export --output runs/demo/evaluation --retrieval data/raw/demo/beir \\
        --baselines --finetune --query "drop rows with missing values"

The result is ``results.json`` in the output folder: settings, a row for each measurement, and the hits of the query;
``queries/`` has the values of each query, for `condenser evaluate compare`. It is rewritten as each row finishes, and a
row is computed again only if something it depends on has changed: weights, tokenizer, pooling, length, collection,
fine-tuning, library versions, or the query that it answers.
"""

import copy
import hashlib
import importlib.metadata
import json
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from condenser.data.store import write_json
from condenser.evaluation import encoders
from condenser.evaluation.comparison import write_queries
from condenser.evaluation.finetuning import Tuning, fine_tune
from condenser.evaluation.pooling import with_pooling
from condenser.evaluation.search import BM25
from condenser.evaluation.tasks import Attention, Retrieval, Similarity, Task
from condenser.evaluation.whitening import whitened

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ZERO_SHOT_NOTE = (
    "Rows that are not fine-tuned say little about pre-training: [CLS] vectors are not trained to be compared. After a "
    "short pre-training they normally retrieve worse than a random encoder's. Compare the fine-tuned rows."
)
PACKAGES = ("accelerate", "bm25s", "PyStemmer", "pytrec-eval-terrier", "sentence-transformers", "torch", "transformers")
RANDOM = "random initialisation"


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
        if measured.values:
            write_queries(folder, self.fingerprint, row, measured.values)
        return row, measured.hits


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def evaluate(
    model: str,
    /,
    *,
    output: str,
    retrieval: list[str] | None = None,
    similarity: list[str] | None = None,
    attention: str | None = None,
    mteb: list[str] | None = None,
    baselines: bool = False,
    finetune: bool = False,
    finetune_steps: int = 1000,
    finetune_epochs: int | None = None,
    finetune_batch_size: int = 64,
    finetune_learning_rate: float = 2e-5,
    train_sizes: list[str] | None = None,
    hard_negatives: int = 0,
    mini_batch: int = 0,
    pooling: list[str] | None = None,
    whitening: list[int] | None = None,
    max_length: int | None = None,
    index: Literal["exact", "faiss"] = "exact",
    query: str | None = None,
    seeds: list[int] | None = None,
) -> None:
    """Measure an encoder: retrieval on BEIR folders, similarity on STS files, attention of [CLS]; also fine-tuned.

    The defaults of fine-tuning suit an encoder of base size; a small one from scratch wants about 5e-4. Collections
    that cannot be trained on are also measured with the encoders that were fine-tuned on others of their kind.

    Args:
        model: a folder (such as `condenser export` writes), a checkpoint or run folder, or a model of the hub
        output: folder for results.json; rows that it holds already are not computed again
        retrieval: folders with corpus.jsonl, queries.jsonl and qrels/test.tsv, each plain or compressed
        similarity: files of sentence pairs with scores, or folders with a test and a train file
        attention: token store on whose validation split the entropy of [CLS] attention is taken, by layer
        mteb: tasks or benchmarks of the mteb library by name (such as "NanoBEIR"); needs the network
        baselines: also BM25, and the same architecture with random weights
        finetune: also fine-tune on qrels/train.tsv of each collection, the train file of each set of pairs
        finetune_steps: optimizer steps, at most
        finetune_epochs: passes over the training data, at most
        finetune_batch_size: pairs of query and passage; the other passages of a batch are the negatives
        finetune_learning_rate: peak learning rate
        train_sizes: numbers of training questions or pairs, or "all"; each is fine-tuned on (default: all)
        hard_negatives: passages that BM25 ranks high though they are not relevant, for each pair
        mini_batch: pairs computed at a time, for batches that do not fit into memory (gradient caching)
        pooling: cls, mean, max, mean+max, last<k>-cls, weighted-layers; several are compared (default: the model's)
        whitening: also with whitened vectors of so many dimensions, 0 for all; fitted on each collection's texts
        max_length: tokens of queries and passages, also in fine-tuning; the model's own setting by default
        index: compare by torch, or by faiss
        query: a question that the last encoder answers from the first collection
        seeds: of fine-tuning and random weights; each is a row, the table shows mean and spread (default: 0)
    """
    packages, seeds = versions(), seeds or [0]
    sizes = [None if size == "all" else whole_number(size) for size in train_sizes or ["all"]]
    tunings = [
        Tuning(
            finetune_steps,
            finetune_epochs,
            finetune_batch_size,
            finetune_learning_rate,
            hard_negatives,
            mini_batch,
            train_size=size,
            seed=seed,
        )
        for size in sizes
        for seed in seeds
    ]
    path = result_path(Path(output))
    tasks: list[Task] = [Retrieval.read(folder, index) for folder in retrieval or []]
    tasks += [Similarity.read(file) for file in similarity or []]
    tasks += [Attention(Path(attention))] if attention else []
    if not tasks and not mteb:
        raise ValueError("nothing to measure: give --retrieval, --similarity, --attention or --mteb")
    if finetune and not any(task.trains for task in tasks):
        raise ValueError(
            f"{', '.join(task.name for task in tasks)}: nothing to fine-tune on, such as relevant pairs in "
            "qrels/train.tsv or a train file of sentence pairs"
        )
    with encoders.model_folder(model) as folder:
        encoder = encoders.load_encoder(folder, max_length)
        for task in tasks:
            if isinstance(task, Attention):
                task.check_tokenizer(encoder)
        several = tunings if finetune else [], pooling or [], whitening or [], seeds
        jobs = plan(tasks, encoder, *several, baselines, query)
        settings = {
            "model": model,
            **encoders.describe(encoder),
            "head_loss": encoders.head_losses(folder, attention) if attention else None,
            "passages": "title (if any) and text",
            "finetune": finetune and asdict(tunings[0]) | {"train_size": sizes, "seed": seeds, "dropout": 0.0},
            "bm25": BM25,
            "versions": packages,
        }
        found = compute(jobs, settings, path)
        if mteb:
            from condenser.evaluation.mteb_tasks import run_mteb

            found["mteb"] = run_mteb(encoder, mteb)
            write_json(path, found)
    show(found)
    print(f"wrote {path}")


def whole_number(size: str) -> int:
    if not size.isdecimal():
        raise ValueError(f"--train-sizes {size}: give numbers, or all")
    return int(size)


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
    starts = {None: encoder} if not poolings else {name: with_pooling(encoder, name) for name in poolings}
    twins = {(name, seed): encoders.reinitialised(start, seed) for name, start in starts.items() for seed in seeds}
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


def versions() -> dict[str, str]:
    """Of the packages that are needed, as numbers depend on them."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as missing:
        raise ImportError(f"evaluation needs {missing.name}: pip install 'condenser[eval]'") from None


def result_path(folder: Path) -> Path:
    """``results.json`` in a folder that is new, or holds nothing else."""
    path = folder / "results.json"
    others = {file.name for file in folder.glob("*")} - {path.name, path.with_suffix(".partial").name, "queries"}
    if others:
        raise ValueError(f"{folder} holds {min(others)!r}, which is no result of this command: another --output?")
    folder.mkdir(parents=True, exist_ok=True)
    return path


def compute(plan: list[Job], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run the jobs whose row the file lacks, rewriting it after each. -> what it holds at the end"""
    jobs = {job.fingerprint: job for job in plan}
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "fingerprints": []}
    known = dict(zip(before["fingerprints"], before["rows"], strict=True))
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
        found = {"settings": settings, "rows": [rows[mark] for mark in marks], "fingerprints": marks}
        write_json(path, found | ({"example": example} if example else {}))
    for values in (path.parent / "queries").glob("*.json"):
        if values.stem not in rows:
            values.unlink()
    return json.loads(path.read_text())


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for kind, metrics in {task.kind: task.metrics for task in (Retrieval, Similarity)}.items():
        rows = averaged([row for row in found["rows"] if row["task"] == kind], metrics)
        if rows:
            numeric = (Column(metric, justify="right", no_wrap=True) for metric in metrics)
            table = Table("collection", "encoder", *numeric, box=None, padding=(0, 1, 0, 0))
            for row in rows:
                table.add_row(row["collection"], in_words(row), *(row[metric] for metric in metrics))
            console.print(table)
    console.print(ZERO_SHOT_NOTE)
    if answer := found.get("example"):
        print(f"\n{answer['query']}    ({answer['answered_by']})")
        for hit in answer["hits"]:
            print(f"  {hit['rank']}. {hit['score']:.3f}  {hit['id']}\n     {textwrap.shorten(hit['text'], 110)}")


def in_words(about: dict[str, Any]) -> str:
    """Which encoder it is, such as 'pre-trained, mean, fine-tuned on 1000 of squad, whitened to 256'."""
    words = [about["model"], *([about["pooling"]] if about["pooling"] else [])]
    if about["trained_on"]:
        size = f"{about['train_size']} of " if about["train_size"] not in (None, "all") else ""
        words.append(f"fine-tuned on {size}{about['trained_on']}")
    if about["whitening"] is not None:
        words.append(f"whitened to {about['whitening']}" if about["whitening"] else "whitened")
    return ", ".join(words)


def averaged(rows: list[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all seeds: which it is, and of each metric the mean and, of several, the standard deviation."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    names = ("collection", "model", "pooling", "whitening", "trained_on", "train_size")
    for row in rows:
        size = "all" if row["fine_tuned"] and row["train_size"] is None else row["train_size"]
        groups.setdefault(tuple(({**row, "train_size": size})[name] for name in names), []).append(row)
    found = []
    for key, some in groups.items():
        means = {metric: mean_and_spread([row[metric] for row in some]) for metric in metrics}
        found.append(dict(zip(names, key, strict=True)) | means)
    return found


def mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"
