"""The command `condenser evaluate compare`: is one model better than another, or are these queries just easier for it?

    condenser evaluate compare runs/condenser/evaluation runs/mlm/evaluation --metric ndcg@10

Both were measured on the same queries, so what counts is the difference query by query. `condenser evaluate` keeps
them in ``queries/<fingerprint>.json`` of its output folder, one file for each row of its table:
``{"row": ..., "values": {query id: {metric: value}}}``; of similarity each pair's cosine and score, from which both
correlations are computed again for every draw of pairs.
"""

import json as json_format
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from condenser.data.store import write_json
from condenser.evaluation.search import Values

SAME = ("collection", "model", "pooling", "whitening", "fine_tuned", "trained_on", "train_size", "seed", "split")
CORRELATIONS = ("spearman", "pearson")
LEVEL = 0.95
DRAWN_TOGETHER = 2**22  # numbers
MEAN: Any = partial(np.mean, axis=1)  # [samples, queries] -> [samples]


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
    """Compare two evaluations on every row that both have: paired bootstrap over the queries, or pairs of sentences.

    Shown are both means, the difference B - A, its 95 % interval, and the two-sided p-value of there being none. They
    tell about other queries or pairs of this kind, not about other seeds of training: for those, compare several runs.

    Args:
        a: output folder of `condenser evaluate`
        b: another
        metric: ndcg@10, mrr@10, recall@100, recall@1000 or map; of similarity spearman or pearson
        samples: how often queries or pairs are drawn
        seed: of the draws
        json: a file for the figures

    Raises:
        ValueError: a folder without values of queries, no row in common, or other queries in a row of one name.
    """
    if samples < 1:
        raise ValueError(f"--samples {samples}: at least 1 is needed; 10000 are usual")
    kind, drawn = ("similarity", "pairs") if metric in CORRELATIONS else ("retrieval", "queries")
    ours, theirs = (read_rows(Path(folder), kind) for folder in (a, b))
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise ValueError(
            f"{a} and {b} share no row: theirs are {described(ours)}; and {described(theirs)}. Evaluate both on the "
            "same collections, fine-tuned alike and with the same seed"
        )
    rows = []
    for key in shared:
        values, means, statistic = paired(ours[key], theirs[key], metric, f"{a} and {b}, {described([key])}")
        low, high, p = paired_bootstrap(values, samples, seed, statistic)
        row = dict(zip(SAME, key, strict=True)) | {drawn: len(values), "a": means[0], "b": means[1]}
        rows.append(row | {"difference": float(statistic(values[None])[0]), "low": low, "high": high, "p": p})
    settings = {"a": a, "b": b, "metric": metric, "samples": samples, "seed": seed, "level": LEVEL}
    show(settings, rows, drawn)
    if json:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(json), settings | {"rows": rows})


def write_queries(folder: Path, fingerprint: str, row: dict[str, Any], values: Values) -> None:
    """Keep the values of each query beside a row of the table; ``folder`` is the command's output folder."""
    (folder / "queries").mkdir(parents=True, exist_ok=True)
    write_json(folder / "queries" / f"{fingerprint}.json", {"row": row, "values": values})


def read_queries(folder: Path) -> list[tuple[dict[str, Any], Values]]:
    """-> all that `write_queries` kept there"""
    kept = [json_format.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("queries/[!.]*.json"))]
    return [(each["row"], each["values"]) for each in kept]


def read_rows(folder: Path, kind: str) -> dict[tuple, Values]:
    """Rows of retrieval or similarity by the fields in ``SAME``.

    Raises:
        ValueError: nothing to read, or two rows that those fields do not tell apart.
    """
    rows: dict[tuple, Values] = {}
    for row, values in read_queries(folder):
        if row.get("task", "retrieval") != kind:
            continue
        row = {"split": "test" if kind == "retrieval" else None} | row
        key = tuple(row.get(field) for field in SAME)
        if key in rows:
            raise ValueError(f"{folder}/queries holds {described([key])} twice: evaluate again into a new folder")
        rows[key] = values
    if not rows:
        raise ValueError(
            f"{folder} has no queries/*.json of {kind}: give a folder that `condenser evaluate --{kind}` wrote, or "
            f"another --metric ({' and '.join(CORRELATIONS)} compare similarity, the others retrieval)"
        )
    return rows


def described(keys: Any) -> str:
    """Rows in words, such as 'scifact: pre-trained, fine-tuned, pooling cls, seed 1'."""
    words = []
    for key in keys:
        row = dict(zip(SAME, key, strict=True))
        tuned = ["fine-tuned"] if row.pop("fine_tuned") else []
        facts = [f"{name} {value}" for name, value in row.items() if name in SAME[2:] and value is not None]
        words.append(", ".join([f"{row['collection']}: {row['model']}", *tuned, *facts]))
    return "; ".join(words)


def paired(
    ours: Values, theirs: Values, metric: str, where: str
) -> tuple[np.ndarray, tuple[float, float], Callable[[np.ndarray], np.ndarray]]:
    """-> values to draw from, ``[queries]`` or ``[pairs, 3]``; both means or correlations; and a function that gives
    the difference B - A for each of several draws of values"""
    if ours.keys() != theirs.keys() or any(ours[i].get("score") != theirs[i].get("score") for i in ours):
        raise ValueError(f"{where}: not the same queries or pairs, so not the same collection")
    if metric in CORRELATIONS:
        cosines = [[each["cosine"] for each in values.values()] for values in (ours, theirs)]
        table = np.array([*cosines, [each["score"] for each in ours.values()]]).T
        found = correlations(table[None], metric)[0]
        return table, tuple(found.tolist()), lambda drawn: np.diff(correlations(drawn, metric))[:, 0]
    known = set.intersection(*(set(each) for values in (ours, theirs) for each in values.values()))
    if metric not in known:
        raise ValueError(f"{where}: --metric {metric} is not among {', '.join(sorted(known))}")
    left, right = (np.array([values[query][metric] for query in ours]) for values in (ours, theirs))
    return right - left, (float(left.mean()), float(right.mean())), MEAN


def correlations(drawn: np.ndarray, metric: str) -> np.ndarray:
    """``[samples, pairs, 3]``, A's cosine, B's and the score -> of both cosines with the score, ``[samples, 2]``"""
    from scipy.stats import rankdata

    values = rankdata(drawn, axis=1) if metric == "spearman" else drawn
    values = values - values.mean(axis=1, keepdims=True)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    return (values[..., :2] * values[..., 2:]).sum(axis=1)


def paired_bootstrap(
    values: np.ndarray, samples: int, seed: int, statistic: Callable[[np.ndarray], np.ndarray] = MEAN
) -> tuple[float, float, float]:
    """-> both ends of the percentile interval of the difference, and its two-sided p-value

    The p-value is the share of resamples whose difference, shifted by the one found, is at least as far from 0 as that
    one (Efron & Tibshirani 1993, section 16.4; Sakai, SIGIR 2006, for retrieval).
    """
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_TOGETHER // values.size)
    differences = np.empty(samples)
    for start in range(0, samples, at_once):
        part = differences[start : start + at_once]
        part[:] = statistic(values[rng.integers(len(values), size=(len(part), len(values)))])
    found = statistic(values[None])[0]
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    farther = int(np.count_nonzero(np.abs(differences - found) >= abs(found)))
    return float(low), float(high), (1 + farther) / (1 + samples)


def show(settings: dict[str, Any], rows: list[dict[str, Any]], drawn: str) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    numbers = (Column(name, justify="right", no_wrap=True) for name in (drawn, "A", "B", "B - A", "95 %", "p"))
    told = [name for name in SAME if name in ("collection", "model") or len({row[name] for row in rows}) > 1]
    table = Table(*told, *numbers, box=None, padding=(0, 1, 0, 0))
    for row in rows:
        means = (f"{row[name]:.4f}" for name in ("a", "b"))
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        found = (f"{row[drawn]:,}", *means, f"{row['difference']:+.4f}", interval, f"{row['p']:.4f}")
        table.add_row(*("" if row[name] is None else str(row[name]) for name in told), *found)
    print(f"{settings['metric']}, {settings['samples']:,} samples\nA = {settings['a']}\nB = {settings['b']}")
    Console().print(table)
