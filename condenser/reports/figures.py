"""The curves of one or several runs, drawn over each other: one inline SVG per panel, for ``condenser report``.

The SVGs name no font file, no address and no fixed ink: text and axes take the colour of the page around them
(``currentColor``, ``--grid``, ``--paper``), so that one drawing serves light, dark and print. A panel is one line of
``PANELS``; a metric that no panel claims, say the loss of a new objective, gets a panel of its own.
"""

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from condenser.runs import Curves, in_words

UNIGRAM = "val/unigram_loss_at_mask"
ENTROPY_TITLE = "[CLS] attention entropy by layer"
NOT_DRAWN = {"train/loss", "val/loss", "train/tokens_seen"}  # sums of what is drawn, or another name of the x axis
CLS_READ, RETRIEVED = ("true", "other", "zeros"), ("ndcg@10", "mrr@10", "recall@100", "map")
ENTROPY = "probe/cls_entropy_layer_"
DASHES = ("-", "--", ":", "-.")
OKABE_ITO = ("#1b80c4", "#e69f00", "#cc79a7", "#009e73", "#d55e00", "#56b4e9")  # blue lightened for dark pages
INK, GRID, PAPER = "#010203", "#040506", "#070809"  # stand-ins for the page's own colours
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 4),
    "axes.ymargin": 0.08,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    metrics: tuple[str, ...]
    scale: float = 1.0
    log: bool = False


PANELS = (
    Panel("Backbone MLM loss", "loss (nats)", ("train/mlm_loss", "val/mlm_loss")),
    Panel("Head MLM loss", "loss (nats)", ("train/head_mlm_loss", "val/head_mlm_loss")),
    Panel("Loss at [MASK] positions", "loss (nats)", ("val/mlm_loss_at_mask", "val/head_mlm_loss_at_mask", UNIGRAM)),
    Panel("Backbone MLM accuracy", "accuracy (%)", ("train/mlm_accuracy", "val/mlm_accuracy"), scale=100),
    Panel("Head MLM accuracy", "accuracy (%)", ("train/head_mlm_accuracy", "val/head_mlm_accuracy"), scale=100),
    Panel("Learning rate", "learning rate", ("train/lr",)),
    Panel("Gradient norm", "norm before clipping", ("train/grad_norm",), log=True),
    Panel("Throughput", "tokens/s", ("perf/tokens_per_second",)),
    Panel("Model FLOPs utilisation", "% of the peak", ("perf/mfu",), scale=100),
    Panel("Padding", "% of the computed area", ("perf/padding_fraction",), scale=100),
    Panel("Waiting for data", "% of the time", ("perf/data_wait_fraction",), scale=100),
    Panel("Time that probes take", "% of the time", ("perf/probe_fraction",), scale=100),
    Panel("Time that zero-shot retrieval takes", "% of the time", ("perf/retrieval_fraction",), scale=100),
    Panel("Head loss by the [CLS] it reads", "loss (nats)", tuple(f"probe/head_loss_{c}" for c in CLS_READ)),
    Panel("Zero-shot [CLS] retrieval, which usually falls", "score", tuple(f"probe/{m}" for m in RETRIEVED)),
)


def draw_panels(runs: Sequence[Curves], x_label: str, smooth: float) -> list[tuple[str, str]]:
    """(title, SVG) of every panel that at least one run has data for."""
    logged = {metric for curves in runs for metric in curves}
    with matplotlib.rc_context(STYLE):
        return [(p.title, draw(p, runs, x_label, smooth)) for p in panels_for(logged) if logged & set(p.metrics)]


def panels_for(logged: set[str]) -> list[Panel]:
    layers = sorted((metric for metric in logged if metric.startswith(ENTROPY)), key=lambda m: int(name_of(m)))
    panels = [*PANELS, Panel(ENTROPY_TITLE, "share of log n", tuple(layers))]
    others = sorted(logged - NOT_DRAWN - {metric for panel in panels for metric in panel.metrics})
    by_stem: defaultdict[str, list[str]] = defaultdict(list)
    for metric in others:
        by_stem[metric.rpartition("/")[2]].append(metric)
    titles = {stem: stem.replace("_", " ") for stem in by_stem}
    units = {stem: "loss (nats)" if "loss" in stem else title for stem, title in titles.items()}
    return [*panels, *(Panel(titles[s].capitalize(), units[s], tuple(metrics)) for s, metrics in by_stem.items())]


def draw(panel: Panel, runs: Sequence[Curves], x_label: str, smooth: float) -> str:
    figure = Figure(figsize=(4.7, 2.7), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=panel.unit, yscale="log" if panel.log else "linear")
    for curves, colour in zip(runs, run_colours(len(runs)), strict=True):
        for metric in panel.metrics:
            if metric in curves and metric != UNIGRAM:
                x, values = curves[metric]
                shown = np.isfinite(values) & ((values > 0) | (not panel.log))
                x, values = x[shown], values[shown] * panel.scale
                if metric.startswith("probe/"):
                    plot_probe(axes, panel.metrics, metric, x, values, colour)
                else:
                    plot(axes, metric, x, values, colour, smooth)
    if UNIGRAM in panel.metrics:
        plot_unigram(axes, runs)
    elif "nats" in panel.unit:
        leave_out_start(axes)
    name_lines(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if panel.unit == "tokens/s":
        axes.yaxis.set_major_formatter(axes.xaxis.get_major_formatter())
    return to_svg(figure, panel.title)


def name_lines(axes: Axes) -> None:
    """A legend beside the panel for the lines that have a label, in no run's colour."""
    if named := dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)):
        beside: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": 1 + (len(named) > 12)}
        legend = axes.legend(named.values(), named, frameon=False, fontsize=7, reverse=True, **beside)
        for line in legend.get_lines():
            line.set_color(INK)


def plot(axes: Axes, metric: str, x: np.ndarray, values: np.ndarray, colour: str, smooth: float) -> None:
    """Validation: dots, hollow for the head. Training: as logged and faint, its moving mean in front."""
    if metric.startswith("val/"):
        line, face = ("o:", PAPER) if "head_" in metric else ("o-", colour)
        axes.plot(x, values, line, color=colour, mfc=face, ms=3.8, lw=1, markevery=max(1, len(x) // 30), zorder=3)
        return
    width = int(len(x) * smooth / 100)
    if metric != "train/lr" and width > 1:
        axes.plot(*thinned(x, values), color=colour, lw=0.7, alpha=0.3)
        log = axes.get_yscale() == "log"
        values = np.exp(moving_mean(np.log(values), width)) if log else moving_mean(values, width)
    axes.plot(*thinned(x, values), color=colour, lw=1.5)


def plot_probe(axes: Axes, metrics: Sequence[str], metric: str, x: np.ndarray, values: np.ndarray, colour: str) -> None:
    """One of several lines of a run, named beside the panel: a layer is paler the lower it is, all else is dashed."""
    number, layer = metrics.index(metric), metric.startswith(ENTROPY)
    alpha, dashes = ((1 + number) / len(metrics), "-") if layer else (1, DASHES[number % len(DASHES)])
    axes.plot(*thinned(x, values), dashes, marker=".", ms=4, lw=1.2, color=colour, alpha=alpha, label=name_of(metric))


def name_of(metric: str) -> str:
    """probe/cls_entropy_layer_3 -> 3"""
    return re.split("[/_]", metric)[-1]


def thinned(x: np.ndarray, values: np.ndarray, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest of every so many points: ``n`` such pairs, which a panel's width can show, look like
    the curve that has more."""
    each = -(-len(x) // n)
    if each <= 2:
        return x, values
    bounds = range(0, len(x), each)
    extremes = {i + int(pick(values[i : i + each])) for i in bounds for pick in (np.argmin, np.argmax)}
    kept = sorted({0, *extremes, len(x) - 1})
    return x[kept], values[kept]


def leave_out_start(axes: Axes) -> None:
    """End the y axis where the loss is after 5 % of the steps: the first fall would flatten all that follows."""
    x, values = (np.concatenate([line.get_data()[axis] for line in axes.lines]) for axis in (0, 1))
    later = values[x > 0.05 * x.max(initial=0)]
    if len(later) and later.max() > later.min():
        axes.set_ylim(top=later.max() + 0.08 * np.ptp(later), bottom=values.min() - 0.08 * np.ptp(later))


def plot_unigram(axes: Axes, runs: Sequence[Curves]) -> None:
    """One dashed line per distinct level: runs on the same validation text share it."""
    for level in sorted({round(float(curves[UNIGRAM][1][-1]), 2) for curves in runs if UNIGRAM in curves}):
        axes.axhline(level, color=INK, lw=1, ls="--")
        at = axes.get_yaxis_transform()
        axes.text(0.99, level, f"unigram {level:.2f}", transform=at, ha="right", va="bottom", fontsize=8)


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred, so that it does not lag; narrower at the start, so that it does not bend the first steep fall."""
    i = np.arange(len(values))
    before = np.minimum(width // 2, i)
    after = np.minimum(before, i[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def draw_over(title: str, unit: str, theirs: Mapping[str, Curves], ours: Sequence[Curves]) -> str:
    """Runs in their colours over reference runs, which are dashed by what their label has before a comma. The x axis
    begins at 2 % of the shortest run: the first steps would take most of its decades."""
    kinds = list(dict.fromkeys(label.partition(",")[0] for label in theirs))
    dashes = {kind: {"ls": DASHES[n % len(DASHES)], "lw": 0.8 + n // len(DASHES)} for n, kind in enumerate(kinds)}
    grey = [{"color": INK, "alpha": 0.45, "label": (k := label.partition(",")[0]), **dashes[k]} for label in theirs]
    dotted = [{"color": colour, "lw": 1.5, "marker": "o", "ms": 3.8} for colour in run_colours(len(ours))]
    lines = zip((*theirs.values(), *ours), (*grey, *dotted), strict=True)
    drawn: list[Any] = [(*curves[title], style) for curves, style in lines if title in curves]
    start = 0.02 * min(x[-1] for x, _, _ in drawn)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.7, 2.7), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens seen", ylabel=unit, xscale="log")
        for x, values, style in drawn:
            shown = np.isfinite(values) & (x >= start)
            axes.plot(x[shown], values[shown], **style)
        name_lines(axes)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        return to_svg(figure, title)


def draw_entropies(rows: Sequence[dict[str, Any]]) -> str:
    with matplotlib.rc_context(STYLE):
        return to_svg(entropy_figure(rows), ENTROPY_TITLE)


def entropy_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """How widely [CLS] attends in each layer, before fine-tuning and (dashed) after it: a line for each row of an
    evaluation's attention, one colour for all seeds."""
    figure = Figure(figsize=(6.4, 2.7), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="share of log n", ylim=(0, 1.02))
    names = list(dict.fromkeys(in_words(row) for row in rows))
    for row in rows:
        values, name = row["cls_entropy"], in_words(row)
        style: Any = {"color": run_colours(len(names))[names.index(name)], "ls": "--" if row["trained_on"] else "-"}
        axes.plot(range(1, len(values) + 1), values, marker="o", ms=3, lw=1.5, label=name, **style)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(named.values(), named, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set_xticks(range(1, max(len(row["cls_entropy"]) for row in rows) + 1))
    return figure


def run_colours(n: int) -> list[str]:
    if n <= len(OKABE_ITO):
        return list(OKABE_ITO[:n])
    return [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(0.2, 0.95, n))]


def short(value: float) -> str:
    """1500 -> 1.5k, 2e9 -> 2B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.99995 * size:  # what four digits round up to it
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def to_svg(figure: Figure, title: str) -> str:
    """Inline SVG: the page's colours, no namespaces (HTML needs none), no ids but those that it refers to itself."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids differ between the panels of one page
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg[svg.index("<svg") :])
    for stand_in, colour in ((INK, "currentColor"), (GRID, "var(--grid)"), (PAPER, "var(--paper)")):
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg", '<svg role="img"', 1)
