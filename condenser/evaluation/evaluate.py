"""The command `condenser evaluate`: retrieval, similarity and probes of an encoder, as it is and fine-tuned.

    condenser evaluate runs/demo/export --output runs/demo/evaluation --retrieval data/raw/demo/beir \\
        --baselines --finetune --query "drop rows with missing values"

The result is ``results.json`` in the output folder: settings, a row for each measurement that was asked for, and the
hits of the query; ``attention.svg`` is a drawing of what ``--attention`` found. ``rows/`` has a file for each row, with
the values of its queries or pairs, for `condenser evaluate compare`. A row is computed again only if something it
depends on has changed: weights, tokenizer, pooling, length, collection, fine-tuning, library versions, or the query
that it answers.
"""

import itertools
import statistics
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table

from condenser.data.lock import locked
from condenser.data.store import leftovers, write_json
from condenser.evaluation import encoders
from condenser.evaluation.finetuning import Tuning
from condenser.evaluation.jobs import ROWS, compute, plan, versions
from condenser.evaluation.mteb_tasks import find_tasks, run_mteb
from condenser.evaluation.pooling import check_name, fit_whitening, with_pooling
from condenser.evaluation.probes import probe_store
from condenser.evaluation.retrieval import Collection
from condenser.evaluation.search import BM25
from condenser.evaluation.similarity import Similarity
from condenser.evaluation.tasks import Attention, Task, check_training, read_tasks
from condenser.hub import load_export
from condenser.models.files import is_run
from condenser.models.heads import HEAD_FILE
from condenser.reports.tables import table
from condenser.runs import ZERO_SHOT_NOTE, at_least, in_words

OWN = {"results.json", ROWS, "choices", "attention.svg"}  # of the output folder
WRITTEN = ("results.json", f"{ROWS}/*", "choices/*")  # what a killed process may leave unfinished
WHICH = ("collection", "model", "pooling", "whitening", "trained_on", "train_size", "pair_loss")  # a row, but seeds


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
    finetune_epochs: float = 3.0,
    finetune_batch_size: int = 64,
    finetune_learning_rate: float | Literal["auto"] = 2e-5,
    train_sizes: list[str] | None = None,
    hard_negatives: int = 0,
    pair_losses: list[str] | None = None,
    mini_batch: int = 0,
    pooling: list[str] | None = None,
    whitening: list[int] | None = None,
    max_length: int | None = None,
    split: str = "test",
    queries: int | None = None,
    query: str | None = None,
    seeds: list[int] | None = None,
) -> None:
    """Measure an encoder: retrieval on BEIR folders, similarity on STS files, attention of [CLS]; also fine-tuned.

    The default learning rate suits an encoder of base size; a small one from scratch wants about 5e-4, or auto.

    Args:
        model: a folder (such as `condenser export` writes), a checkpoint or run folder, or a model of the hub
        output: folder for results.json, which has the rows of this call; what the folder holds already is not computed
            again
        retrieval: folders with corpus.jsonl, queries.jsonl and qrels/test.tsv (see --split), each plain or compressed
        similarity: files of sentence pairs with scores, or folders with a test and a train file
        attention: token store on whose validation split the entropy of [CLS] attention is taken, by layer
        mteb: tasks or benchmarks of the mteb library by name (such as "NanoBEIR"), by the model's own pooling; needs
            the network
        baselines: also BM25, on whole texts and on what the encoder reads of them, and random weights
        finetune: also fine-tune on qrels/train.tsv of each collection, the train file of each set of pairs
        finetune_epochs: passes over the training data, such as 2.5
        finetune_batch_size: pairs of query and passage; the other passages of a batch are the negatives
        finetune_learning_rate: peak learning rate; "auto" tries 2e-5, 1e-4 and 5e-4, for retrieval each with cosine
            and dot product, and takes what scores best on a tenth of the training data, held out by a hash
        train_sizes: numbers of training questions or pairs, or "all"; each is fine-tuned on (default: all)
        hard_negatives: for each pair, passages drawn from BM25's first 200 that are not judged relevant
        pair_losses: on sentence pairs: cosent, cosine; several are compared (default: cosent)
        mini_batch: pairs computed at a time, for batches that do not fit into memory (gradient caching)
        pooling: cls, mean, max, mean+max, last<k>-cls, weighted-layers, attention; several are compared (default: the
            model's)
        whitening: also with whitened vectors of so many dimensions, 0 or their own number for all; fitted on each
            collection's texts
        max_length: tokens of queries and passages, also in fine-tuning; the model's own setting by default
        split: which file of a collection's qrels is scored, such as dev, which is MS MARCO's
        queries: so many of each collection, drawn with a fixed seed (default: all of the split)
        query: a question that the last encoder answers from the first collection
        seeds: of fine-tuning and random weights; each is a row, the table shows mean and spread (default: 0)
    """
    texts, of_collections = retrieval or similarity, query or queries is not None or split != "test"
    if not (texts or attention or mteb):
        raise ValueError("nothing to measure: give --retrieval, --similarity, --attention or --mteb")
    check_needs(
        ("--seeds are of fine-tuning and random weights", seeds, "--finetune or --baselines", finetune or baselines),
        ("--query, --queries and --split are of collections", of_collections, "--retrieval", retrieval),
        ("--pooling and --whitening are of vectors", pooling or whitening, "--retrieval or --similarity", texts),
        ("--max-length is of texts", max_length, "--retrieval, --similarity or --mteb", texts or mteb),
        ("--finetune trains on texts", finetune, "--retrieval or --similarity", texts),
        ("--baselines are none of MTEB's", baselines, "--retrieval, --similarity or --attention", texts or attention),
    )
    packages, seeds, losses, sizes = versions(), seeds or [0], pair_losses or ["cosent"], train_sizes or ["all"]
    rate = None if finetune_learning_rate == "auto" else finetune_learning_rate
    told = finetune_epochs, finetune_batch_size, rate, hard_negatives, mini_batch
    tunings = read_tunings(told, sizes, losses, seeds)
    if not finetune and any(replace(tuning, seed=0) != Tuning() for tuning in tunings):
        raise ValueError(
            "--finetune-epochs, --finetune-batch-size, --finetune-learning-rate, --train-sizes, --hard-negatives, "
            "--pair-losses and --mini-batch are settings of --finetune: give it too, or none of them"
        )
    at_least("max-length", max_length, 3)  # two are special tokens
    at_least("queries", queries, 1)
    for dimensions in whitening or []:
        at_least("whitening", dimensions, 0)
    for name in pooling or []:
        check_name(name)
    if not is_run(model):
        encoders.check_folder(model)
    path, of_mteb = result_path(Path(output)), find_tasks(mteb or [])
    tasks = read_tasks(retrieval or [], similarity or [], attention, queries, split)
    if finetune:
        check_training(tasks, tunings)
    with encoders.model_folder(model) as folder:
        encoder = encoders.load_encoder(folder, max_length)
        check_encoder(encoder, tasks, pooling or [], whitening or [])
        poolings: list[Any] = pooling or [None]
        drawn = seeds if baselines else []
        jobs = plan(tasks, encoder, tunings if finetune else [], poolings, whitening or [], drawn, query)
        settings = {
            "model": model,
            **encoders.describe(encoder),
            "head_loss": head_loss(folder, attention) if attention else None,
            "passages": "title (if any) and text",
            "finetune": finetune and asdict(tunings[0]) | {"train_size": sizes, "seed": seeds, "dropout": 0.0},
            "bm25": BM25,
            "versions": packages,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / ".lock", f"--output {output}: {{holder}} is at work there; wait, or give another"):
            for file in leftovers(path.parent, *WRITTEN):
                file.unlink(missing_ok=True)
            found = compute(jobs, settings, path)
            if of_mteb:
                found["mteb"] = run_mteb(encoder, of_mteb, path.parent / ROWS)
            write_json(path, found)
            attention_rows = [row for row in found["rows"] if row["task"] == Attention.kind]
            draw_attention(attention_rows, path.with_name("attention.svg"))
    show(found)
    print(f"wrote {path}")


def read_tunings(
    told: tuple[float, int, float | None, int, int], sizes: Sequence[str], losses: Sequence[str], seeds: Sequence[int]
) -> list[Tuning]:
    """By loss, size and seed, with what they share; a size is a number or "all"."""
    if wrong := [size for size in sizes if size != "all" and not size.isdecimal()]:
        raise ValueError(f"--train-sizes {wrong[0]}: give numbers, or all")
    numbers = [None if size == "all" else int(size) for size in sizes]
    return [Tuning(*told, n, loss, seed) for loss, n, seed in itertools.product(losses, numbers, seeds)]


def check_needs(*options: tuple[str, Any, str, Any]) -> None:
    """Raises ValueError for one that is given without what it needs: (what, whether given, needs, whether there)."""
    for what, is_given, needs, is_there in options:
        if is_given and not is_there:
            raise ValueError(f"{what}: give {needs} too")


def head_loss(folder: str, store: str) -> dict[str, float] | None:
    """What the head of an export loses without the true [CLS]; None for a model without a head."""
    if not (Path(folder) / HEAD_FILE).is_file():
        return None
    model = load_export(folder)
    return probe_store(model, model.lm, store).get("head_loss")


def check_encoder(encoder: Any, tasks: Sequence[Task], poolings: Sequence[str], whitening: Sequence[int]) -> None:
    """ValueError for what the encoder cannot be measured on, pooled or whitened to."""
    for pooled in (with_pooling(encoder, name) for name in poolings) if poolings else (encoder,):
        for task in tasks:
            if isinstance(task, Attention):
                task.check_tokenizer(encoder)
                continue
            for dimensions in whitening:
                check_whitening(pooled, task, dimensions)


def check_whitening(encoder: Any, task: Collection | Similarity, dimensions: int) -> None:
    texts, size = task.texts(), encoder.get_embedding_dimension()
    if dimensions > size or len(texts) <= (dimensions or size):
        raise ValueError(
            f"--whitening {dimensions}: vectors have {size} dimensions, and {task.name} has {len(texts)} texts to fit "
            "it on, of which it needs more than dimensions"
        )
    some = list(dict.fromkeys(texts))[: 2 * size]
    if dimensions < size and (dimensions > size / 2 or dimensions >= len(some)):  # vectors may vary in fewer
        fit_whitening(encoders.encoded(encoder, some, task.texts_are).cpu().numpy(), dimensions)


def result_path(folder: Path) -> Path:
    """``results.json`` in a folder that is new, or holds nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file: give a folder")
    left = {file.name for file in leftovers(folder, *WRITTEN)}
    if others := {file.name for file in folder.glob("[!.]*")} - OWN - left:
        raise ValueError(f"{folder} holds {min(others)!r}, which is no result of this command: another --output?")
    return folder / "results.json"


def show(found: dict[str, Any]) -> None:
    for task in (Collection, Similarity):
        if rows := [row for row in found["rows"] if row["task"] == task.kind]:
            print_rows(task.metrics, averaged(rows, task.metrics))
        if unseen := {row["collection"]: row["queries_unseen"] for row in rows if "queries_unseen" in row}:
            counts = ", ".join(f"{name} {n:,}" for name, n in unseen.items())
            print(f"unseen: queries whose relevant documents are none of the training split's: {counts}")
    for row in found["rows"]:
        if row["task"] == Attention.kind:
            shares = " ".join(f"{share:.2f}" for share in row["cls_entropy"])
            print(f"[CLS] attends, {in_words(row)}: by layer {shares} of the most there is (all tokens alike)")
    if tasks := found.get("mteb"):
        scores = ((task["collection"], task["metric"], f"{task['score']:.3f}") for task in tasks)
        Console().print(table(("MTEB's task", "metric", "score"), scores))
    print(ZERO_SHOT_NOTE)
    if answer := found.get("example"):
        print(f"\n{answer['query']}    ({answer['answered_by']})")
        for hit in answer["hits"]:
            print(f"  {hit['rank']}. {hit['score']:.3f}  {hit['id']}\n     {textwrap.shorten(hit['text'], 110)}")


def print_rows(numbers: Sequence[str], rows: Iterable[tuple[dict[str, Any], Sequence[str]]]) -> None:
    """A table of rows of an evaluation: which each is, and what stands in its columns of numbers."""
    columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
    shown = Table("collection", "encoder", *columns, box=None, padding=(0, 1, 0, 0))
    for row, cells in rows:
        shown.add_row(row["collection"], in_words(row), *cells)
    Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False).print(shown)


def draw_attention(rows: list[dict[str, Any]], path: Path) -> None:
    """What --attention found as a drawing; without rows no file."""
    if not rows:
        return path.unlink(missing_ok=True)
    import matplotlib

    from condenser.reports.figures import entropy_figure

    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # ids would be drawn at random
        entropy_figure(rows).savefig(path, bbox_inches="tight", metadata={"Date": None})


def averaged(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Of all seeds one row, and of each metric the mean and, of several, the standard deviation."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in WHICH), []).append(row)
    for some in groups.values():
        values = [[row[metric] for row in some if row.get(metric) is not None] for metric in metrics]
        yield some[0], [mean_and_spread(of_seeds) for of_seeds in values]


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" if values else ""
