"""One or several runs as one HTML page: numbers at a glance, curves over each other, the settings that differ.

    condenser report runs/condenser-base runs/mlm-only --output report.html
    condenser report runs/* --output report.html --x tokens
    condenser report runs/condenser-base --output report.html --reference study

The page reads what every run folder holds, ``config.yaml`` and ``metrics.csv``, and where they exist ``summary.json``
(written when a run finishes) and ``evaluation/results.json``. It is one file that asks nothing of the network:
mail it, print it, keep it beside the checkpoint. A run in progress can be reported at any time.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader

from condenser.data.store import atomic_write
from condenser.reports.figures import ENTROPY_TITLE, UNIGRAM, draw_entropies, draw_over, draw_panels, run_colours, short
from condenser.reports.reference import PANELS, STUDIES, comparable, over_tokens, read_reference
from condenser.reports.tables import check_figures
from condenser.runs import (
    CONFIG,
    METRICS,
    RESULTS,
    SUMMARY,
    ZERO_SHOT_NOTE,
    Curves,
    flatten,
    read_mapping,
    read_metrics,
    version_of,
)

Panels = list[tuple[str, str]]  # title, SVG
MAIN = ("seed_everything", "model", "data")  # settings of a run that is shown alone


@dataclass
class Run:
    name: str
    colour: str
    config: dict[str, Any]  # dotted keys
    curves: Curves  # by step
    summary: dict[str, Any] | None  # dotted keys; None: unfinished
    evaluation: dict[str, Any] | None  # as it is shown

    def last(self, metric: str) -> float:
        return float(self.curves[metric][1][-1])

    @property
    def last_step(self) -> int:
        """As logged: the first is 0."""
        return max(int(steps[-1]) for steps, _ in self.curves.values())


def report(
    runs: list[str],
    /,
    *,
    output: str,
    x: Literal["step", "tokens"] = "step",
    reference: str | None = None,
) -> None:
    """Write curves and tables of one or several runs to one self-contained HTML file.

    Args:
        runs: run folders, runs/<name>
        output: the HTML file to write
        x: what the curves are drawn over
        reference: draw the runs over known ones too, to see whether they are normal: `study` (from random weights) or
            `warm` (all objectives, from a trained encoder) for those of configs/study, or a CSV of others
    """
    known = STUDIES.get(reference, Path(reference)) if reference else None
    if known and not known.is_file():
        raise ValueError(f"--reference {reference} is neither a file nor one of {', '.join(STUDIES)}")
    loaded = load_runs(runs)
    compared = comparison(loaded, known) if known else []
    curves = [over_tokens(run.curves, run.name) if x == "tokens" else run.curves for run in loaded]
    check_figures(output, "--output")
    panels = draw_panels(curves, {"step": "step", "tokens": "tokens seen"}[x])
    html = page(loaded, panels, known, compared)
    with atomic_write(Path(os.path.realpath(output))) as unfinished:
        unfinished.write_text(html, encoding="utf-8")
    print(f"wrote {output}")


def load_runs(runs: Sequence[str]) -> list[Run]:
    silent = [run for run in runs if is_silent(Path(run))]
    if 0 < len(silent) < len(runs):
        print(f"left out, as nothing is logged there yet: {', '.join(silent)}")
        runs = [run for run in runs if run not in silent]
    folders = {Path(run).resolve(): Path(run) for run in runs}
    if len(folders) < len(runs):
        print(f"{len(runs)} runs given, of which {len(runs) - len(folders)} repeat others: each is shown once")
    taken = Counter(folder.name for folder in folders)
    names = [folder.name if taken[folder.name] == 1 else str(given) for folder, given in folders.items()]
    return [load_run(*each) for each in zip(folders, names, run_colours(len(names)), strict=True)]


def is_silent(folder: Path) -> bool:
    """Whether a run was launched only (or is an array's folder), or has not come to its first row of metrics."""
    names, metrics = {path.name for path in folder.glob("*")}, folder / METRICS
    return names == {"launch"} or ({CONFIG, "lock"} <= names and not (metrics.is_file() and metrics.stat().st_size))


def load_run(folder: Path, name: str, colour: str) -> Run:
    for needed in (CONFIG, METRICS):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder} has no {needed}: give run folders (runs/<name>) that `condenser fit` wrote")
    summary, results = (read_mapping(folder / file) for file in (SUMMARY, RESULTS))
    try:
        evaluation = shown_evaluation(results) if results else None
    except (AttributeError, KeyError, TypeError) as error:
        message = f"{folder / RESULTS} holds no rows of `condenser evaluate`: remove it, or evaluate again"
        raise ValueError(message) from error
    return Run(
        name=name,
        colour=colour,
        config=dict(flatten(read_mapping(folder / CONFIG))),
        curves=read_metrics(folder / METRICS),
        summary=None if summary is None else dict(flatten(summary)),
        evaluation=evaluation,
    )


def page(runs: Sequence[Run], panels: Panels, reference: Path | None, compared: Panels) -> str:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["cell"] = cell
    columns = [{metric: run.last(metric) for metric in sorted(run.curves)} | (run.summary or {}) for run in runs]
    versions = [f"{package} {version_of(package)}" for package in ("condenser", "matplotlib")]
    return environment.get_template("report.html").render(
        runs=runs,
        made=", ".join([datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), *versions]),
        warnings=[line for run in runs for line in warnings(run)],
        glance=side_by_side([facts(run) for run in runs]),
        panels=panels,
        reference=reference,
        compared=compared,
        numbers=side_by_side(columns),
        settings=settings(runs),
        entropy_title=ENTROPY_TITLE,
        note=ZERO_SHOT_NOTE,
    )


def warnings(run: Run) -> Iterator[str]:
    if run.summary is None:
        yield f"{run.name} is unfinished (it has no summary.json): last logged step {run.last_step:,}."
    for metric, (steps, values) in run.curves.items():
        bad = steps[~np.isfinite(values)]
        if len(bad):
            yield f"{run.name}: {metric} is not finite in {len(bad)} rows, first at step {bad[0]:,}; not drawn there."


def facts(run: Run) -> dict[str, object]:
    """What to look at first."""
    found: dict[str, object] = {"state": "unfinished" if run.summary is None else "finished"}
    found["steps"] = (run.summary or {}).get("steps", run.last_step + 1)
    if "train/tokens_seen" in run.curves:
        found["tokens"] = short(run.last("train/tokens_seen"))
    if "perf/tokens_per_second" in run.curves:
        found["tokens/s, median"] = short(float(np.nanmedian(run.curves["perf/tokens_per_second"][1])))
    for metric in sorted(run.curves):
        if metric.startswith("val/"):
            found[metric] = run.last(metric)
        if metric.endswith("loss_at_mask") and metric != UNIGRAM and UNIGRAM in run.curves:
            found[f"{metric}, less unigram"] = run.last(metric) - run.last(UNIGRAM)
    return found


def settings(runs: Sequence[Run]) -> list[list[object]]:
    """The settings that differ; of a single run those of its model and data."""
    rows = side_by_side([{key: str(value) for key, value in run.config.items() if key != "name"} for run in runs])
    if len(runs) == 1:
        return [row for row in rows if str(row[0]).split(".")[0] in MAIN]
    return [row for row in rows if len(set(row[1:])) > 1]


def side_by_side(columns: Sequence[Mapping[str, object]]) -> list[list[object]]:
    """A row for each key of any column: the key, then its values."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key) for column in columns)] for key in keys]


def comparison(runs: Sequence[Run], reference: Path) -> Panels:
    """(title, SVG) of the runs over those of a reference file, as far as both measured the same."""
    theirs = {label: comparable(curves) for label, curves in read_reference(reference).items()}
    ours = [comparable(over_tokens(run.curves, run.name)) for run in runs]
    shown = {title: unit for title, unit in PANELS.items() if any(title in curves for curves in ours)}
    return [(title, draw_over(title, unit, theirs, ours)) for title, unit in shown.items()]


def shown_evaluation(found: dict[str, Any]) -> dict[str, Any]:
    """What `condenser evaluate` found: attention as SVG, tables (the header first) by task, settings, an example."""
    by_task: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    rows = [row | {"model": row["model"]} for row in found.get("rows", [])]  # all of them have one
    for row in [*rows, *(found.get("mteb") or [])]:
        by_task[row.get("task", "retrieval")].append(row)
    attention = by_task.pop("attention", [])
    tables = []
    for rows in by_task.values():
        columns = [column for column in side_by_side(rows) if column[0] != "task"]
        told = [column for column in columns if any(value is not None for value in column[1:])]
        tables.append([*zip(*told, strict=True)])
    settings = " · ".join(f"{key} {value}" for key, value in flatten(found.get("settings", {})))
    return {
        "attention": draw_entropies(attention) if attention else None,
        "tables": tables,
        "settings": settings,
        "example": found.get("example"),
    }


def cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "—", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        digits = ",.0f" if value.is_integer() or abs(value) >= 1000 else ".4f" if abs(value) >= 0.001 else ".4g"
        return format(value, digits)
    return str(value)
