"""The command `condenser evaluate`: retrieval on BEIR folders, as the encoder is and fine-tuned, beside baselines.

    condenser evaluate runs/demo/export --output runs/demo/evaluation --retrieval data/raw/demo/beir \\
        --baselines --finetune --query "drop rows with missing values"

The result is ``retrieval.json`` in the output folder: settings, one row per collection and model, and the hits of the
query. It is rewritten as each row finishes, and a row is computed again only if something it depends on has changed:
weights, tokenizer, pooling, length, collection, fine-tuning, library versions.
"""

import copy
import importlib.metadata
import importlib.util
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from condenser.data.store import write_json
from condenser.evaluation import encoders, retrieval
from condenser.evaluation.finetune import FineTuning, fine_tune

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FILE = "retrieval.json"
EXAMPLE_HITS = 5
EXAMPLE = "\N{NULL}example"  # id of --query among the queries of a collection
ZERO_SHOT_NOTE = (
    "Rows without fine-tuning compare raw [CLS] vectors. After a short pre-training these normally retrieve worse than "
    "those of a random encoder, which is a bag of words. Compare the fine-tuned rows."
)
REQUIRED = {"bm25s": "bm25s", "pytrec_eval": "pytrec-eval-terrier", "sentence_transformers": "sentence-transformers"}
LIBRARIES = (*REQUIRED.values(), "torch", "transformers")
ModelName = Literal["BM25", "random initialisation", "pre-trained"]


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    collection: retrieval.Collection
    model: ModelName
    encoder: "SentenceTransformer | None"  # before fine-tuning; None for BM25
    tuning: FineTuning | None
    query: str | None  # of --query, on the one job that answers it
    fingerprint: str  # of all that the row depends on


def evaluate(
    model: str,
    /,
    *,
    output: str,
    retrieval: list[str],
    baselines: bool = False,
    finetune: bool = False,
    finetune_steps: int = 150,
    finetune_batch_size: int = 32,
    finetune_learning_rate: float = 5e-4,
    max_length: int = 64,
    query: str | None = None,
    seed: int = 0,
) -> None:
    """Measure retrieval (nDCG@10, MRR@10, Recall@100, MAP) with an encoder's vectors on BEIR folders.

    The defaults of fine-tuning suit a small encoder from scratch; for one of base size take about 2e-5 and an epoch.

    Args:
        model: a folder (such as `condenser export` writes) or a model of the Hugging Face hub
        output: folder for retrieval.json; rows that it holds already are not computed again
        retrieval: folders with corpus.jsonl, queries.jsonl and qrels/test.tsv, each plain or compressed
        baselines: also BM25, and the same architecture with random weights
        finetune: also fine-tune on qrels/train.tsv of each collection, and measure that
        finetune_steps: optimizer steps
        finetune_batch_size: pairs of query and passage; the other passages of a batch are the negatives
        finetune_learning_rate: peak learning rate
        max_length: tokens of queries and passages, also in fine-tuning; the rest is cut off
        query: a question to answer from the first collection with the best of the encoders trained here
        seed: of random weights and of fine-tuning
    """
    check_installed()
    results = Results(Path(output))
    tuning = FineTuning(finetune_steps, finetune_batch_size, finetune_learning_rate, seed) if finetune else None
    collections = read_collections(retrieval, tuning)
    encoder = encoders.load_encoder(model, max_length)
    jobs = list(plan(encoder, collections, baselines, tuning, query, seed))
    results.settings = describe(model, encoder, collections, tuning, seed)
    for number, job in enumerate(jobs, start=1):
        done = results.reuse(job)
        print(f"{number}/{len(jobs)} {title(job)}{': as before' if done else ''}")
        if not done:
            results.add(job, *run(job))
    results.show()


def check_installed() -> None:
    missing = [distribution for module, distribution in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"evaluation needs {', '.join(missing)}: pip install 'condenser[eval]'")


def read_collections(folders: list[str], tuning: FineTuning | None) -> list[retrieval.Collection]:
    collections = [retrieval.read_collection(Path(folder)) for folder in folders]
    for collection, folder in zip(collections, folders, strict=True):
        if tuning and not collection.train_pairs:
            raise ValueError(f"{folder} has no relevant pairs in qrels/train.tsv, which --finetune trains on")
    return collections


def plan(
    encoder: "SentenceTransformer",
    collections: list[retrieval.Collection],
    baselines: bool,
    tuning: FineTuning | None,
    query: str | None,
    seed: int,
) -> Iterator[Job]:
    """Rows in the order of the table: each collection's BM25, encoders as they are, encoders fine-tuned."""
    starts: dict[ModelName, SentenceTransformer] = {"pre-trained": encoder}
    if baselines:
        starts = {"random initialisation": encoders.reinitialised(encoder, seed), "pre-trained": encoder}
    described = {name: encoders.describe(start) for name, start in starts.items()}
    versions = library_versions()
    for collection in collections:
        if baselines:
            yield Job(collection, "BM25", None, None, None, encoders.fingerprint(collection.fingerprint, versions))
        for settings in (None, tuning) if tuning else (None,):
            for name, start in starts.items():
                depends_on = (collection.fingerprint, versions, described[name], settings and asdict(settings))
                answers = name == "pre-trained" and settings is tuning and collection is collections[0]
                mark = encoders.fingerprint(*depends_on)
                yield Job(collection, name, start, settings, query if answers else None, mark)


def run(job: Job) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """-> the row, and what the job found for its query if it has one"""
    collection, queries = job.collection, job.collection.test_queries
    if job.encoder is None:
        found = retrieval.bm25_search(collection.documents, queries)
    else:
        encoder = copy.deepcopy(job.encoder) if job.tuning else job.encoder
        if job.tuning:
            fine_tune(encoder, collection.train_pairs, job.tuning)
        asked = queries | ({EXAMPLE: job.query} if job.query else {})
        found = retrieval.dense_search(encoder, collection.documents, asked)
    hits = found.pop(EXAMPLE, None)
    row = {"collection": collection.name, "model": job.model, "fine_tuned": job.tuning is not None}
    row |= retrieval.score(found, collection.test)
    row |= {"queries": len(queries), "documents": len(collection.documents)}
    return row, None if hits is None else example(job, hits)


def example(job: Job, hits: dict[str, float]) -> dict[str, Any]:
    best = [
        {"rank": rank, "id": document, "score": score, "text": shortened(job.collection.documents[document])}
        for rank, (document, score) in enumerate(retrieval.best(hits, EXAMPLE_HITS), start=1)
    ]
    return {"query": job.query, "answered_by": title(job), "fingerprint": job.fingerprint, "hits": best}


def shortened(text: str) -> str:
    return textwrap.shorten(text, width=300, placeholder=" ...")


def title(job: Job) -> str:
    return f"{job.collection.name}: {job.model}{', fine-tuned' if job.tuning else ''}"


def describe(
    model: str,
    encoder: "SentenceTransformer",
    collections: list[retrieval.Collection],
    tuning: FineTuning | None,
    seed: int,
) -> dict[str, Any]:
    return {
        "model": model,
        **encoders.describe(encoder),
        "seed": seed,
        "titles": {c.name: "before the text" if c.has_titles else "none" for c in collections},
        "finetune": asdict(tuning) | {"loss": "MultipleNegativesRankingLoss", "dropout": 0.0} if tuning else None,
        "bm25": "bm25s: k1 1.5, b 0.75, English stop words, no stemming",
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


class Results:
    """``retrieval.json``: rows of this command so far, and those of the last one that it may use again."""

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output {folder} is a file; a folder is needed")
        others = {path.name for path in folder.glob("*")} - {FILE, Path(FILE).with_suffix(".partial").name}
        if others:
            raise ValueError(f"{folder} holds {min(others)!r}, which is no result of this command: another --output?")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        before = read_results(self.path)
        self.before = dict(zip(before["fingerprints"], before["rows"], strict=True))
        self.example_before = before.get("example")
        self.settings: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}  # by fingerprint
        self.example: dict[str, Any] | None = None

    def reuse(self, job: Job) -> bool:
        """Take over the job's row if there is one, and the answer to its query if it has one."""
        known = self.example_before or {}
        answered = job.query is None or (known.get("query"), known.get("fingerprint")) == (job.query, job.fingerprint)
        if job.fingerprint not in self.before or not answered:
            return False
        self.add(job, self.before[job.fingerprint], self.example_before if job.query else None)
        return True

    def add(self, job: Job, row: dict[str, Any], found: dict[str, Any] | None) -> None:
        self.rows[job.fingerprint] = row
        self.example = found or self.example
        rows = self.rows | {mark: old for mark, old in self.before.items() if mark not in self.rows}
        self.write(rows, self.example or self.example_before)

    def write(self, rows: dict[str, dict[str, Any]], found: dict[str, Any] | None) -> None:
        content = {"settings": self.settings, "rows": list(rows.values()), "fingerprints": list(rows)}
        write_json(self.path, content | ({"example": found} if found else {}))

    def show(self) -> None:
        """Print the table and the hits; the file keeps this command's rows only."""
        self.write(self.rows, self.example)
        show_table(list(self.rows.values()))
        if self.example:
            show_example(self.example)
        print(f"wrote {self.path}")


def read_results(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"rows": [], "fingerprints": []}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): move it away to start anew") from None


def show_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("collection", Column("model", no_wrap=True), "fine-tuned")
    for metric in retrieval.METRICS:
        table.add_column(metric, justify="right")
    for row in rows:
        numbers = (f"{row[metric]:.3f}" for metric in retrieval.METRICS)
        table.add_row(row["collection"], row["model"], "yes" if row["fine_tuned"] else "no", *numbers)
    console = Console()
    console.print(table)
    if any(row["model"] == "pre-trained" and not row["fine_tuned"] for row in rows):
        console.print(ZERO_SHOT_NOTE)


def show_example(found: dict[str, Any]) -> None:
    print(f"\n{found['query']}    ({found['answered_by']})")
    for hit in found["hits"]:
        print(f"  {hit['rank']}. {hit['score']:.3f}  {hit['id']}\n     {textwrap.shorten(hit['text'], 110)}")
