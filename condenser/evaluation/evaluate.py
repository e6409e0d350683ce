"""The command `condenser evaluate`: retrieval on BEIR folders, as the encoder is and fine-tuned, beside baselines.

    condenser evaluate runs/demo/export --output runs/demo/evaluation --retrieval data/raw/demo/beir \\
        --baselines --finetune --query "drop rows with missing values"

The result is ``retrieval.json`` in the output folder: settings, one row per collection and model, and the hits of the
query. It is rewritten as each row finishes, and a row is computed again only if something it depends on has changed:
weights, tokenizer, pooling, length, collection, fine-tuning, library versions, or the query that it answers.
"""

import copy
import hashlib
import importlib.metadata
import itertools
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condenser.data.store import write_json
from condenser.evaluation import encoders
from condenser.evaluation.retrieval import METRICS, Collection, bm25_search, dense_search, read_collection, score

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXAMPLE_HITS = 5
EXAMPLE = "\N{NULL}example"  # id of --query among the queries of a collection
ZERO_SHOT_NOTE = (
    "Rows that are not fine-tuned say little about pre-training: [CLS] vectors are not trained to be compared. After a "
    "short pre-training they normally retrieve worse than a random encoder's. Compare the fine-tuned rows."
)
PACKAGES = ("accelerate", "bm25s", "pytrec-eval-terrier", "sentence-transformers", "torch", "transformers")


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    collection: Collection
    model: str
    encoder: "SentenceTransformer | None" = None  # before fine-tuning; None for BM25
    tuning: dict[str, Any] | None = None
    query: str | None = None  # of --query, in the one job that answers it

    def __str__(self) -> str:
        return f"{self.collection.name}: {self.model}{', fine-tuned' if self.tuning else ''}"

    def fingerprint(self) -> str:
        """Of all that the row depends on."""
        encoder = self.encoder and encoders.describe(self.encoder)
        parts = (self.collection.fingerprint, self.model, encoder, self.tuning, self.query, versions())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def evaluate(
    model: str,
    /,
    *,
    output: str,
    retrieval: list[str],
    baselines: bool = False,
    finetune: bool = False,
    finetune_steps: int = 1000,
    finetune_batch_size: int = 64,
    finetune_learning_rate: float = 2e-5,
    max_length: int | None = None,
    query: str | None = None,
    seed: int = 0,
) -> None:
    """Measure retrieval (nDCG@10, MRR@10, Recall@100, MAP) with an encoder's vectors on BEIR folders.

    The defaults of fine-tuning suit an encoder of base size; a small one from scratch wants about 5e-4.

    Args:
        model: a folder (such as `condenser export` writes) or a model of the Hugging Face hub
        output: folder for retrieval.json; rows that it holds already are not computed again
        retrieval: folders with corpus.jsonl, queries.jsonl and qrels/test.tsv, each plain or compressed
        baselines: also BM25, and the same architecture with random weights
        finetune: also fine-tune on qrels/train.tsv of each collection, and measure that
        finetune_steps: optimizer steps
        finetune_batch_size: pairs of query and passage; the other passages of a batch are the negatives
        finetune_learning_rate: peak learning rate
        max_length: tokens of queries and passages, also in fine-tuning; the model's own setting by default
        query: a question that the encoder (fine-tuned, if asked for) answers from the first collection
        seed: of random weights and of fine-tuning
    """
    packages = versions()
    tuning: dict[str, Any] = {"steps": finetune_steps, "batch_size": finetune_batch_size}
    tuning["learning_rate"] = finetune_learning_rate
    if finetune_steps < 1 or finetune_batch_size < 2 or finetune_learning_rate <= 0:
        raise ValueError(f"fine-tuning takes steps >= 1, batch size >= 2 and learning rate > 0, not {tuning}")
    tunings: list[dict[str, Any] | None] = [None, tuning | {"seed": seed}] if finetune else [None]
    path = result_path(Path(output))
    collections = [read_collection(Path(folder)) for folder in retrieval]
    if untrainable := [f for f, c in zip(retrieval, collections, strict=True) if finetune and not c.train_pairs]:
        raise ValueError(f"{untrainable[0]} has no relevant pairs in qrels/train.tsv, which --finetune trains on")
    encoder = encoders.load_encoder(model, max_length)
    jobs = plan(collections, encoder, tunings, baselines, query, seed)
    settings = {
        "model": model,
        **encoders.describe(encoder),
        "passages": "title (if any) and text",
        "seed": seed,
        "finetune": tunings[-1] and tunings[-1] | {"loss": "MultipleNegativesRankingLoss", "dropout": 0.0},
        "bm25": "bm25s: k1 1.5, b 0.75, English stop words, no stemming",
        "versions": packages,
    }
    show(compute(jobs, settings, path))
    print(f"wrote {path}")


def plan(
    collections: list[Collection],
    encoder: "SentenceTransformer",
    tunings: list[dict[str, Any] | None],
    baselines: bool,
    query: str | None,
    seed: int,
) -> list[Job]:
    """The rows of the table, in order; the first collection's last encoder answers the query."""
    starts = {"random initialisation": encoders.reinitialised(encoder, seed)} if baselines else {}
    starts["pre-trained"] = encoder
    jobs = []
    for collection in collections:
        jobs += [Job(collection, "BM25")] if baselines else []
        jobs += [Job(collection, name, starts[name], tuning) for tuning in tunings for name in starts]
    answering = len(jobs) // len(collections) - 1
    jobs[answering] = replace(jobs[answering], query=query)
    return jobs


def versions() -> dict[str, str]:
    """Of the packages that are needed, as numbers depend on them."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as missing:
        raise ImportError(f"evaluation needs {missing.name}: pip install 'condenser[eval]'") from None


def result_path(folder: Path) -> Path:
    """``retrieval.json`` in a folder that is new, or holds nothing else."""
    path = folder / "retrieval.json"
    others = {file.name for file in folder.glob("*")} - {path.name, path.with_suffix(".partial").name}
    if others:
        raise ValueError(f"{folder} holds {min(others)!r}, which is no result of this command: another --output?")
    folder.mkdir(parents=True, exist_ok=True)
    return path


def compute(plan: list[Job], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run the jobs whose row the file lacks, rewriting it after each. -> what it holds at the end"""
    jobs = {job.fingerprint(): job for job in plan}
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "fingerprints": []}
    known = dict(zip(before["fingerprints"], before["rows"], strict=True))
    rows = {mark: known[mark] for mark in jobs if mark in known}
    example = before.get("example") if any(jobs[mark].query for mark in rows) else None
    for number, (mark, job) in enumerate(jobs.items(), start=1):
        print(f"{number}/{len(jobs)} {job}{': as before' if mark in rows else ''}")
        if mark not in rows:
            rows[mark], hits = run(job)
            example = {"query": job.query, "answered_by": str(job), "hits": hits} if hits else example
        marks = [mark for mark in jobs if mark in rows]
        found = {"settings": settings, "rows": [rows[mark] for mark in marks], "fingerprints": marks}
        write_json(path, found | ({"example": example} if example else {}))
    return json.loads(path.read_text())


def run(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """-> the row, and the first hits for the job's query if it has one"""
    collection = job.collection
    asked = collection.queries | ({EXAMPLE: job.query} if job.query else {})
    if job.encoder is None:
        found = bm25_search(collection.documents, asked)
    else:
        encoder = copy.deepcopy(job.encoder)
        if job.tuning:
            encoders.fine_tune(encoder, collection.train_pairs, job.tuning)
        found = dense_search(encoder, collection.documents, asked)
    best = itertools.islice(found.pop(EXAMPLE, {}).items(), EXAMPLE_HITS)
    row = {"collection": collection.name, "model": job.model, "fine_tuned": job.tuning is not None}
    row |= score(found, collection.qrels)
    row |= {"queries": len(collection.queries), "documents": len(collection.documents)}
    return row, [
        {"rank": rank, "id": i, "score": value, "text": textwrap.shorten(collection.documents[i], 300)}
        for rank, (i, value) in enumerate(best, start=1)
    ]


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    numeric = (Column(metric, justify="right") for metric in METRICS)
    table = Table("collection", Column("model", no_wrap=True), "fine-tuned", *numeric, box=None, padding=(0, 1, 0, 0))
    for row in found["rows"]:
        numbers = (f"{row[metric]:.3f}" for metric in METRICS)
        table.add_row(row["collection"], row["model"], "yes" if row["fine_tuned"] else "no", *numbers)
    console = Console()
    console.print(table)
    console.print(ZERO_SHOT_NOTE)
    if answer := found.get("example"):
        print(f"\n{answer['query']}    ({answer['answered_by']})")
        for hit in answer["hits"]:
            print(f"  {hit['rank']}. {hit['score']:.3f}  {hit['id']}\n     {textwrap.shorten(hit['text'], 110)}")
