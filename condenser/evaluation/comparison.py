"""The command `condenser evaluate compare`: is one model better than another, or are these queries just easier for it?

    condenser evaluate compare runs/condenser/evaluation runs/mlm/evaluation --metric ndcg@10
    condenser evaluate compare 'runs/condenser-seed=*/evaluation' 'runs/mlm-seed=*/evaluation'

Both were measured on the same queries and fine-tuned with the same seeds, so what counts is the difference, query by
query and seed by seed. Of similarity, both correlations are computed again for every draw of pairs.
"""

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condenser.evaluation.evaluate import WHICH, print_rows
from condenser.evaluation.jobs import read_rows
from condenser.evaluation.search import Values
from condenser.reports.tables import check_figures, write_figures
from condenser.runs import at_least, in_words

SAME = (*WHICH, "fine_tuned", "epochs", "split")
HOW = ("max_length", "similarity", "dtype", "learning_rate", "scale", "examples", "batch_size", "hard_negatives")
CORRELATIONS = ("spearman", "pearson")
LEVEL = 0.95


class Group(NamedTuple):
    """Rows that differ in their seeds alone."""

    row: dict[str, Any]  # one of them
    values: dict[Any, Values]  # by the seeds of pre-training (the place among the folders) and of fine-tuning


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

    Shown are both means, the difference B - A and its 95 % interval, by Student's t: of the variance over queries (by a
    bootstrap of them) and, where there are several, over seeds. So it is wide where two seeds do not agree; with one
    seed it tells about other queries of this kind alone.

    Args:
        a: output folder of `condenser evaluate`, or a pattern of those of several seeds of pre-training
        b: another; of patterns, the folders are paired by seed=N in their names, else in the order of these
        metric: ndcg@10, ndcg@10_unseen, mrr@10, recall@100, recall@1000 or map; of similarity spearman or pearson
        samples: how often queries or pairs are drawn
        seed: of the draws
        json: a file for the figures

    Raises:
        ValueError: a folder without rows or a partner, no row in common, or other queries in a row of one name.
    """
    check_figures(json)
    at_least("samples", samples, 1)
    at_least("seed", seed, 0)
    kind, drawn = ("similarity", "pairs") if metric in CORRELATIONS else ("retrieval", "queries")
    ours, theirs = (groups_of(folders, kind) for folders in matched(a, b))
    shared = [key for key in ours if key in theirs and ours[key].values.keys() & theirs[key].values.keys()]
    if not shared:
        raise ValueError(
            f"{a} and {b} share no row: theirs are {described(ours.values())}; and {described(theirs.values())}. "
            "Evaluate both on the same collections, fine-tuned alike and with the same seeds"
        )
    rows = []
    for key in shared:
        one, two = ours[key], theirs[key]
        where = f"{a} and {b}, {described([one])}"
        seeds = [each for each in one.values if each in two.values]
        tables = [paired(one.values[each], two.values[each], metric, where) for each in seeds]
        if len({len(table) for table in tables}) > 1:
            raise ValueError(f"{where}: not the same queries or pairs with all seeds")
        about = {name: one.row.get(name) for name in SAME} | {drawn: len(tables[0]), "seeds": len(seeds)}
        rows.append(about | interval(np.stack(tables), metric, samples, seed))
    settings = {"a": a, "b": b, "metric": metric, "samples": samples, "seed": seed, "level": LEVEL}
    print(f"{metric}, {samples:,} samples\nA = {a}\nB = {b}")
    shown = []
    for row in rows:
        means = (f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['difference']:+.4f}")
        shown.append((row, (f"{row[drawn]:,}", str(row["seeds"]), *means, f"{row['low']:+.4f} to {row['high']:+.4f}")))
    print_rows((drawn, "seeds", "A", "B", "B - A", "95 %"), shown)
    for name, mine, other in (("A", ours, theirs), ("B", theirs, ours)):
        if alone := [group for key, group in mine.items() if key not in other]:
            print(f"{name} alone has {len(alone)} more: {described(alone)}")
        for key in shared:
            if seeds := sorted({seed for _, seed in mine[key].values.keys() - other[key].values.keys()}):
                print(f"{name} alone has seeds {', '.join(map(str, seeds))} of {described([mine[key]])}")
    for key in shared:
        pairs = {name: (ours[key].row.get(name), theirs[key].row.get(name)) for name in HOW}
        if differ := [f"{name} {one} and {two}" for name, (one, two) in pairs.items() if one != two]:
            print(f"not the same in {described([ours[key]])}: {', '.join(differ)}")
    write_figures(json, settings | {"rows": rows})


def matched(*given: str) -> list[list[Path]]:
    """The folders at two paths or patterns, pair by pair: by the seed in their names, or in the order of these."""
    sides = [[Path(each)] if Path(each).exists() else [*map(Path, sorted(glob.glob(each)))] for each in given]
    if [] in sides:
        raise ValueError(f"there is nothing at {given[sides.index([])]}: give output folders of `condenser evaluate`")
    last = re.compile(r".*seed[=_-]?(\d+)")
    by_seed = [{int(found[1]): folder for folder in side if (found := last.match(str(folder)))} for side in sides]
    shared = sorted(by_seed[0].keys() & by_seed[1].keys())
    if shared and [*map(len, by_seed)] == [*map(len, sides)]:  # each has one of its own
        if alone := [str(folder) for side in by_seed for seed, folder in side.items() if seed not in shared]:
            print(f"left out, as the other has no such seed: {', '.join(alone)}")
        return [[side[seed] for seed in shared] for side in by_seed]
    if len(sides[0]) != len(sides[1]):
        listed = " and ".join(", ".join(map(str, folders)) for folders in sides)
        raise ValueError(f"folders are compared pair by pair, and these are not equally many: {listed}")
    return sides


def groups_of(folders: list[Path], kind: str) -> dict[tuple, Group]:
    """Rows of retrieval or similarity by the fields in ``SAME``; ValueError if there are none."""
    groups: dict[tuple, Group] = {}
    for place, folder in enumerate(folders):
        for row, values in read_rows(folder):
            if row.get("task", "retrieval") == kind:
                group = groups.setdefault(tuple(row.get(name) for name in SAME), Group(row, {}))
                group.values[place, row.get("seed")] = values
    if not groups:
        raise ValueError(
            f"{', '.join(map(str, folders))} has no rows of {kind}: give what `condenser evaluate --{kind}` wrote, or "
            f"another --metric ({' and '.join(CORRELATIONS)} compare similarity, the others retrieval)"
        )
    return groups


def described(groups: Iterable[Group]) -> str:
    """In words, such as 'scifact (test): pre-trained, cls, fine-tuned on scifact'."""
    return "; ".join(f"{row['collection']} ({row.get('split') or 'test'}): {in_words(row)}" for row, _ in groups)


def paired(ours: Values, theirs: Values, metric: str, where: str) -> np.ndarray:
    """-> of queries that have the metric both values, ``[N, 2]``; of pairs both cosines and the score, ``[N, 3]``"""
    if ours.keys() != theirs.keys() or any(ours[i].get("score") != theirs[i].get("score") for i in ours):
        raise ValueError(f"{where}: not the same queries or pairs, so not the same collection")
    if metric in CORRELATIONS:
        return np.array([[ours[i]["cosine"], theirs[i]["cosine"], ours[i]["score"]] for i in ours])
    queries = [i for i in sorted(ours) if metric in ours[i].keys() & theirs[i].keys()]
    if not queries:
        known = {name for each in [*ours.values(), *theirs.values()] for name in each}
        raise ValueError(f"{where}: --metric {metric} is not among {', '.join(sorted(known))}")
    return np.array([[ours[i][metric], theirs[i][metric]] for i in queries])


def interval(tables: np.ndarray, metric: str, samples: int, seed: int) -> dict[str, float]:
    """Of what `paired` gives of each seed, ``[S, N, 2 or 3]``: both means, the difference B - A and its interval.

    What another draw of queries and of seeds would change has as its variance that over queries, and that over seeds,
    less what is in both: how far a seed's own queries are from those of all. Degrees of freedom are Satterthwaite's.
    """
    from scipy.stats import t

    rng, n_seeds, n = np.random.default_rng(seed), *tables.shape[:2]
    whole = scored(tables, metric)  # [S, 2]
    drawn = np.stack([scored(tables[:, rng.integers(n, size=n)], metric) for _ in range(samples)])
    of_draws = drawn[..., 1] - drawn[..., 0]  # [samples, S]
    together = of_draws.mean(axis=1, keepdims=True)
    free_queries, free_seeds = max(n - 1, 1), max(n_seeds - 1, 1)  # degrees of freedom
    queries = np.nanvar(together) * n / free_queries
    seeds = (whole[:, 1] - whole[:, 0]).var() / free_seeds  # 0 of one
    both = np.nanvar(of_draws - together, axis=0).sum() * n / free_queries / free_seeds / n_seeds
    variance = max(queries + seeds - both, queries, seeds)
    reach = 0.0
    if variance > 0:
        freedom = variance**2 / (queries**2 / free_queries + seeds**2 / free_seeds)
        reach = float(t.ppf((1 + LEVEL) / 2, freedom) * variance**0.5)
    a, b = whole.mean(axis=0).tolist()
    return {"a": a, "b": b, "difference": b - a, "low": b - a - reach, "high": b - a + reach}


def scored(tables: np.ndarray, metric: str) -> np.ndarray:
    """``[S, N, 2 or 3]`` -> of each seed A's and B's mean, or correlation with the score, ``[S, 2]``"""
    from scipy.stats import rankdata

    if metric not in CORRELATIONS:
        return tables.mean(axis=1)
    values = rankdata(tables, axis=1) if metric == "spearman" else tables
    values = values - values.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # nothing correlates with draws of one score
        values = values / np.linalg.norm(values, axis=1, keepdims=True)
    return (values[..., :2] * values[..., 2:]).sum(axis=1)
