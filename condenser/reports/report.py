"""One or several runs as one HTML page: numbers at a glance, curves over each other, the settings that differ.

    condenser report runs/condenser-base runs/mlm-only --output report.html
    condenser report runs/* --output report.html --x tokens
    condenser report runs/condenser-base --output report.html --reference study

The page reads what every run folder holds, ``config.yaml`` and ``metrics.csv``, and where they exist ``summary.json``
(written when a run finishes) and ``evaluation/results.json``. It is one file that asks nothing of the network:
mail it, print it, keep it beside the checkpoint. A run in progress can be reported at any time.
"""

import html
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any, Literal

import numpy as np

from condenser.reports.figures import ENTROPY_TITLE, UNIGRAM, draw_entropies, draw_over, draw_panels, run_colours, short
from condenser.reports.reference import PANELS, STUDY, comparable, over_tokens, read_reference
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
)

PAGE = Path(__file__).with_name("report.html")
COMPARISON = Template("""<h2>Is this normal?</h2>
<p class="key">Grey, without dots: the runs of $file. Losses depend on vocabulary and text; what they are below guessing
by frequency hardly does. How high a curve gets is a matter of model size and tokens, but its course should be like
theirs: flat at first, then up, ever slower; a warm start begins high. One that stays at 0 has not left the plateau, and
a head that predicts as well with another text's [CLS] as with its own does not read it.</p>
$panels
""")


class Html(str):
    """Text that is HTML already; all other text is escaped."""


@dataclass
class Run:
    label: Html  # colour and name
    name: str
    config: dict[str, Any]  # dotted keys
    curves: Curves  # by step
    summary: dict[str, Any] | None  # dotted keys; None: unfinished
    evaluation: dict[str, Any] | None

    def last(self, metric: str) -> float:
        return float(self.curves[metric][1][-1])


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
        reference: draw the runs over known ones too, to see whether they are normal: `study` for those of
            configs/study, which come with the package, or a CSV of others
    """
    loaded = load_runs(runs)
    curves = [over_tokens(run.curves, run.name) if x == "tokens" else run.curves for run in loaded]
    compared = "" if reference is None else comparison(loaded, STUDY if reference == "study" else Path(reference))
    panels = draw_panels(curves, {"step": "step", "tokens": "tokens seen"}[x])
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.write_text(page(loaded, panels, compared), encoding="utf-8")
    os.replace(unfinished, target)
    print(f"wrote {target}")


def load_runs(runs: Sequence[str]) -> list[Run]:
    folders = list({Path(run).resolve(): Path(run) for run in runs}.items())
    taken = Counter(full.name for full, _ in folders)
    names = [full.name if taken[full.name] == 1 else str(given) for full, given in folders]
    return [load_run(full, *look) for (full, _), *look in zip(folders, names, run_colours(len(names)), strict=True)]


def load_run(folder: Path, name: str, colour: str) -> Run:
    for needed in (CONFIG, METRICS):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder} has no {needed}: give run folders (runs/<name>) that `condenser fit` wrote")
    summary, evaluation = (read_mapping(folder / file) for file in (SUMMARY, RESULTS))
    return Run(
        label=Html(f'<i style="background:{colour}"></i>{html.escape(name)}'),
        name=name,
        config=dict(flatten(read_mapping(folder / CONFIG))),
        curves=read_metrics(folder / METRICS),
        summary=None if summary is None else dict(flatten(summary)),
        evaluation=evaluation,
    )


def page(runs: Sequence[Run], panels: Sequence[tuple[str, str]], compared: str) -> str:
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    versions = ", ".join(f"{package} {version(package)}" for package in ("condenser", "matplotlib"))
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape("Pre-training report: " + ", ".join(run.name for run in runs)),
        made=html.escape(f"{now}, {versions}"),
        warnings="".join(f'<p class="warning">{html.escape(line)}</p>' for run in runs for line in warnings(run)),
        glance=glance(runs),
        legend=" ".join(f"<span>{run.label}</span>" for run in runs),
        panels=figures(panels),
        compared=compared,
        numbers=final_numbers(runs),
        settings=settings(runs),
        evaluation="".join(evaluation(run) for run in runs if run.evaluation),
    )


def warnings(run: Run) -> Iterator[str]:
    if run.summary is None:
        yield f"{run.name} is unfinished (it has no summary.json): last logged step {last_step(run):,}."
    for metric, (steps, values) in run.curves.items():
        bad = steps[~np.isfinite(values)]
        if len(bad):
            yield f"{run.name}: {metric} is not finite in {len(bad)} rows, first at step {bad[0]:,}; not drawn there."


def last_step(run: Run) -> int:
    return max(int(steps[-1]) for steps, _ in run.curves.values())


def glance(runs: Sequence[Run]) -> str:
    columns = [facts(run) for run in runs]
    return rows_of_runs("run", runs, dict.fromkeys(key for column in columns for key in column), columns)


def facts(run: Run) -> dict[str, object]:
    """What to look at first."""
    found: dict[str, object] = {
        "state": Html('<b class="warning">unfinished</b>') if run.summary is None else "finished",
        "steps": last_step(run),
    }
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


def final_numbers(runs: Sequence[Run]) -> str:
    """The last value of every metric, then whatever the summaries hold."""
    columns = [{metric: run.last(metric) for metric in sorted(run.curves)} | (run.summary or {}) for run in runs]
    return rows_of_runs("last value", runs, dict.fromkeys(key for column in columns for key in column), columns)


def settings(runs: Sequence[Run]) -> str:
    """The settings that differ; of a single run those of its model and data."""
    columns = [{key: str(value) for key, value in run.config.items() if key != "name"} for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if len(runs) == 1:
        title, keys = (
            "Main settings",
            [key for key in keys if key.split(".")[0] in ("seed_everything", "model", "data")],
        )
    else:
        title, keys = "Settings that differ", [key for key in keys if len({column.get(key) for column in columns}) > 1]
    return f"<h2>{title}</h2>{rows_of_runs('setting', runs, keys, columns) if keys else '<p>None.</p>'}"


def rows_of_runs(title: str, runs: Sequence[Run], keys: Iterable[str], columns: Sequence[Mapping[str, object]]) -> str:
    """A column for each run, a row for each key."""
    return table([title, *(run.label for run in runs)], [[key, *(col.get(key) for col in columns)] for key in keys])


def comparison(runs: Sequence[Run], reference: Path) -> str:
    """The runs over those of a reference file, as far as both measured the same."""
    theirs = {label: comparable(curves) for label, curves in read_reference(reference).items()}
    ours = [comparable(over_tokens(run.curves, run.name)) for run in runs]
    shown = {title: unit for title, unit in PANELS.items() if any(title in curves for curves in ours)}
    drawn = figures([(title, draw_over(title, unit, theirs, ours)) for title, unit in shown.items()])
    nothing = "<p>The runs have logged nothing that can be compared yet.</p>"
    return COMPARISON.substitute(file=html.escape(reference.name), panels=drawn if shown else nothing)


def figures(panels: Iterable[tuple[str, str]]) -> str:
    drawn = (f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>" for title, svg in panels)
    return f'<div class="panels">{"".join(drawn)}</div>'


def evaluation(run: Run) -> str:
    found = run.evaluation or {}
    parts = [f"<h2>Evaluation: {run.label}</h2>"]
    by_task: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found["rows"]:
        by_task[row.get("task", "retrieval")].append(row)
    if mteb := found.get("mteb"):
        by_task["mteb"] = mteb
    if attention := by_task.pop("attention", []):
        parts.append(f"<figure><figcaption>{ENTROPY_TITLE}</figcaption>{draw_entropies(attention)}</figure>")
    for rows in by_task.values():
        told = [key for key in rows[0] if key != "task" and any(row.get(key) is not None for row in rows)]
        parts.append(table(told, [[row.get(key) for key in told] for row in rows]))
    settings = " · ".join(f"{key} {value}" for key, value in flatten(found.get("settings", {})))
    parts += [f"<p><small>{html.escape(text)}</small></p>" for text in (settings, ZERO_SHOT_NOTE) if text]
    if example := found.get("example"):
        parts.append(f"<h3>For example: {html.escape(example['query'])}</h3>")
        hits = [[hit[key] for key in ("rank", "id", "score", "text")] for hit in example["hits"]]
        parts.append(table(["rank", "document", "score", "text"], hits))
    return "".join(parts)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{cell(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value: object) -> str:
    if isinstance(value, Html):
        return value
    if isinstance(value, bool) or value is None:
        return {None: "—", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        digits = ",.0f" if value.is_integer() or abs(value) >= 1000 else ".4f" if abs(value) >= 0.001 else ".4g"
        return format(value, digits)
    return html.escape(str(value))
