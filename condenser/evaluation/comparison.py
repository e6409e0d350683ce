"""The command `condenser evaluate compare`: is one model better than another, or are these queries just easier for it?

    condenser evaluate compare runs/condenser/evaluation runs/mlm/evaluation --metric ndcg@10
    condenser evaluate compare 'runs/condenser-seed=*/evaluation' 'runs/mlm-seed=*/evaluation'

Both were measured on the same queries and fine-tuned with the same seeds, so what counts is the difference, query by
query and seed by seed. Of similarity, both correlations are computed again for every draw of pairs.
"""

import glob
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from condenser.data.store import write_json
from condenser.evaluation.jobs import read_rows
from condenser.evaluation.search import Values
from condenser.runs import in_words

SAME = (
    "collection",
    "model",
    "pooling",
    "whitening",
    "fine_tuned",
    "trained_on",
    "train_size",
    "epochs",
    "pair_loss",
    "split",
)
HOW = ("max_length", "similarity", "dtype", "learning_rate", "scale", "examples")  # said where they differ
CORRELATIONS = ("spearman", "pearson")
LEVEL = 0.95

Seeds = dict[Any, Values]  # of pre-training (the place among the folders) and of fine-tuning -> its row's values


def compare(
    a: str,
    b: str,
    /,
    *,
    metric: str = "ndcg@10",
    samples: int = 10_000,
    seed: int = 0,
    json: str | None = None,
) -> None:
    """Compare two models on every row that both have, paired by query (or pair of sentences) and by seed.

    Shown are both means, the difference B - A and its 95 % interval: the percentiles of a bootstrap that draws queries
    and, where there are several, seeds. With one seed the interval tells about other queries of this kind alone.

    Args:
        a: output folder of `condenser evaluate`, or a pattern of those of several seeds of pre-training
        b: another; of patterns, the folders are paired in the order of their names
        metric: ndcg@10, ndcg@10_unseen, mrr@10, recall@100, recall@1000 or map; of similarity spearman or pearson
        samples: how often queries or pairs are drawn
        seed: of the draws
        json: a file for the figures

    Raises:
        ValueError: a folder without rows, no row in common, or other queries in a row of one name.
    """
    if samples < 1:
        raise ValueError(f"--samples {samples}: at least 1 is needed; 10000 are usual")
    kind, drawn = ("similarity", "pairs") if metric in CORRELATIONS else ("retrieval", "queries")
    (ours, our_settings), (theirs, their_settings) = (rows_of(folders, kind) for folders in (a, b))
    shared = [key for key in ours if ours[key].keys() & theirs.get(key, {}).keys()]
    if not shared:
        raise ValueError(
            f"{a} and {b} share no row: theirs are {described(ours)}; and {described(theirs)}. Evaluate both on the "
            "same collections, fine-tuned alike and with the same seeds"
        )
    rows = []
    for key in shared:
        seeds = [each for each in ours[key] if each in theirs[key]]
        where = f"{a} and {b}, {described([key])}"
        tables = [paired(ours[key][each], theirs[key][each], metric, where) for each in seeds]
        if len({len(table) for table in tables}) > 1:
            raise ValueError(f"{where}: not the same queries or pairs with all seeds")
        row: dict[str, Any] = dict(zip(SAME, key, strict=True)) | {drawn: len(tables[0]), "seeds": len(seeds)}
        rows.append(row | interval(np.stack(tables), metric, samples, seed))
    settings = {"a": a, "b": b, "metric": metric, "samples": samples, "seed": seed, "level": LEVEL}
    show(settings, rows, drawn)
    for name, alone in (("A", ours.keys() - theirs.keys()), ("B", theirs.keys() - ours.keys())):
        if alone:
            print(f"{name} alone has {len(alone)} more: {described(sorted(alone, key=str))}")
    for key in shared:
        pairs = {name: (our_settings[key].get(name), their_settings[key].get(name)) for name in HOW}
        if differ := [f"{name} {one} and {two}" for name, (one, two) in pairs.items() if one != two]:
            print(f"not the same in {described([key])}: {', '.join(differ)}")
    if json:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(json), settings | {"rows": rows})


def rows_of(pattern: str, kind: str) -> tuple[dict[tuple, Seeds], dict[tuple, dict[str, Any]]]:
    """Rows of retrieval or similarity by the fields in ``SAME``: of each its seeds, and one row of them whole.

    Raises:
        ValueError: nothing to read.
    """
    rows: dict[tuple, Seeds] = {}
    whole: dict[tuple, dict[str, Any]] = {}
    if not (folders := sorted(glob.glob(pattern))):
        raise ValueError(f"there is nothing at {pattern}: give output folders of `condenser evaluate`")
    for place, folder in enumerate(folders):
        for row, values in read_rows(Path(folder)):
            if row.get("task", "retrieval") == kind:
                key = tuple(row.get(name) for name in SAME)
                rows.setdefault(key, {})[place, row.get("seed")] = values
                whole.setdefault(key, row)
    if not rows:
        raise ValueError(
            f"{pattern} has no rows of {kind}: give what `condenser evaluate --{kind}` wrote, or another --metric "
            f"({' and '.join(CORRELATIONS)} compare similarity, the others retrieval)"
        )
    return rows, whole


def described(keys: Iterable[tuple]) -> str:
    """Rows in words, such as 'scifact (test): pre-trained, cls, fine-tuned on scifact'."""
    rows = [dict(zip(SAME, key, strict=True)) for key in keys]
    return "; ".join(f"{row['collection']} ({row['split'] or 'test'}): {in_words(row)}" for row in rows)


def paired(ours: Values, theirs: Values, metric: str, where: str) -> np.ndarray:
    """-> of queries that have the metric both values, ``[N, 2]``; of pairs both cosines and the score, ``[N, 3]``"""
    if ours.keys() != theirs.keys() or any(ours[i].get("score") != theirs[i].get("score") for i in ours):
        raise ValueError(f"{where}: not the same queries or pairs, so not the same collection")
    if metric in CORRELATIONS:
        return np.array([[ours[i]["cosine"], theirs[i]["cosine"], ours[i]["score"]] for i in ours])
    found = np.array(
        [[ours[i][metric], theirs[i][metric]] for i in sorted(ours) if metric in ours[i].keys() & theirs[i]]
    )
    if not len(found):
        known = sorted({name for values in (ours, theirs) for each in values.values() for name in each})
        raise ValueError(f"{where}: --metric {metric} is not among {', '.join(known)}")
    return found


def interval(tables: np.ndarray, metric: str, samples: int, seed: int) -> dict[str, float]:
    """-> both means over the seeds, the difference B - A, and the ends of its interval

    Args:
        tables: ``[S, N, 2 or 3]``, of each seed what `paired` gives
    """
    rng, n_seeds, n = np.random.default_rng(seed), *tables.shape[:2]
    whole = scored(tables, metric)  # [S, 2]
    differences = np.empty(samples)
    for sample in range(samples):
        of_seeds = scored(tables[:, rng.integers(n, size=n)], metric)
        drawn = rng.integers(n_seeds, size=n_seeds)
        differences[sample] = (of_seeds[drawn, 1] - of_seeds[drawn, 0]).mean()
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    a, b = whole.mean(axis=0).tolist()
    return {"a": a, "b": b, "difference": b - a, "low": float(low), "high": float(high)}


def scored(tables: np.ndarray, metric: str) -> np.ndarray:
    """``[S, N, 2 or 3]`` -> of each seed A's and B's mean, or correlation with the score, ``[S, 2]``"""
    from scipy.stats import rankdata

    if metric not in CORRELATIONS:
        return tables.mean(axis=1)
    values = rankdata(tables, axis=1) if metric == "spearman" else tables
    values = values - values.mean(axis=1, keepdims=True)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    return (values[..., :2] * values[..., 2:]).sum(axis=1)


def show(settings: dict[str, Any], rows: list[dict[str, Any]], drawn: str) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    numbers = (Column(name, justify="right", no_wrap=True) for name in (drawn, "seeds", "A", "B", "B - A", "95 %"))
    table = Table("collection", "encoder", *numbers, box=None, padding=(0, 1, 0, 0))
    for row in rows:
        means = (f"{row[name]:.4f}" for name in ("a", "b"))
        ends = f"{row['low']:+.4f} to {row['high']:+.4f}"
        found = (f"{row[drawn]:,}", str(row["seeds"]), *means, f"{row['difference']:+.4f}", ends)
        table.add_row(row["collection"], in_words(row), *found)
    print(f"{settings['metric']}, {settings['samples']:,} samples\nA = {settings['a']}\nB = {settings['b']}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
