"""The command `condenser evaluate`: retrieval, similarity and probes of an encoder, as it is and fine-tuned.

    condenser evaluate runs/demo/export --output runs/demo/evaluation --retrieval data/raw/demo/beir \\
        --baselines --finetune --query "drop rows with missing values"

The result is ``results.json`` in the output folder: settings, a row for each measurement, and the hits of the query;
``queries/`` has the values of each query or pair, for `condenser evaluate compare`; ``attention.svg`` is a drawing of
what ``--attention`` found. The file is rewritten as each row finishes, and a row is computed again only if something it
depends on has changed: weights, tokenizer, pooling, length, collection, fine-tuning, library versions, or the query
that it answers. Rows that a later call does not ask for wait in ``earlier/`` until one does; those of MTEB stay in the
file until the encoder changes.
"""

import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from condenser.data.store import write_json
from condenser.evaluation import encoders
from condenser.evaluation.finetuning import Tuning
from condenser.evaluation.jobs import compute, plan, versions
from condenser.evaluation.search import BM25
from condenser.evaluation.tasks import Attention, Retrieval, Similarity, Task
from condenser.runs import ZERO_SHOT_NOTE, in_words


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
    split: str = "test",
    queries: int | None = None,
    query: str | None = None,
    seeds: list[int] | None = None,
) -> None:
    """Measure an encoder: retrieval on BEIR folders, similarity on STS files, attention of [CLS]; also fine-tuned.

    The defaults of fine-tuning suit an encoder of base size; a small one from scratch wants about 5e-4. Collections
    that cannot be trained on are also measured with the encoders that were fine-tuned on others of their kind.

    Args:
        model: a folder (such as `condenser export` writes), a checkpoint or run folder, or a model of the hub
        output: folder for results.json; rows that it holds already are not computed again
        retrieval: folders with corpus.jsonl, queries.jsonl and qrels/test.tsv (see --split), each plain or compressed
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
        split: which file of a collection's qrels is scored, such as dev, which is MS MARCO's
        queries: so many of each collection, drawn with a fixed seed (default: all of the split)
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
    tasks: list[Task] = [Retrieval.read(folder, index, queries, split) for folder in retrieval or []]
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

            found["mteb"] = run_mteb(encoder, mteb, found.get("mteb", []))
            write_json(path, found)
    draw_attention([row for row in found["rows"] if row["task"] == "attention"], path.with_name("attention.svg"))
    show(found)
    earlier = len(list(path.parent.glob("earlier/*.json")))
    print(
        f"wrote {path}" + (f"; rows of earlier calls, kept in {path.parent / 'earlier'}: {earlier}" if earlier else "")
    )


def whole_number(size: str) -> int:
    if not size.isdecimal():
        raise ValueError(f"--train-sizes {size}: give numbers, or all")
    return int(size)


def result_path(folder: Path) -> Path:
    """``results.json`` in a folder that is new, or holds nothing else."""
    path = folder / "results.json"
    own = {path.name, path.with_suffix(".partial").name, "queries", "earlier", "attention.svg"}
    others = {file.name for file in folder.glob("*")} - own
    if others:
        raise ValueError(f"{folder} holds {min(others)!r}, which is no result of this command: another --output?")
    folder.mkdir(parents=True, exist_ok=True)
    return path


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
    if tasks := found.get("mteb"):
        table = Table("MTEB's task", "metric", Column("score", justify="right"), box=None, padding=(0, 1, 0, 0))
        for task in tasks:
            table.add_row(task["collection"], task["metric"], f"{task['score']:.3f}")
        console.print(table)
    console.print(ZERO_SHOT_NOTE)
    if answer := found.get("example"):
        print(f"\n{answer['query']}    ({answer['answered_by']})")
        for hit in answer["hits"]:
            print(f"  {hit['rank']}. {hit['score']:.3f}  {hit['id']}\n     {textwrap.shorten(hit['text'], 110)}")


def draw_attention(rows: list[dict[str, Any]], path: Path) -> None:
    """What --attention found as a drawing; without rows no file."""
    if not rows:
        return path.unlink(missing_ok=True)
    from condenser.reports.figures import entropy_figure

    entropy_figure(rows).savefig(path, bbox_inches="tight", metadata={"Date": None})


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
