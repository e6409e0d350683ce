"""The curves of one or several runs, drawn over each other: one inline SVG per panel, for ``condenser report``.

The SVGs name no font file, no address and no fixed ink: text and axes take the colour of the page around them
(``currentColor``, ``--grid``, ``--paper``), so that one drawing serves light, dark and print. A panel is one line of
``PANELS``; a metric that no panel claims, say the loss of a new objective, gets a panel of its own.
"""

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

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
    "path.simplify_threshold": 1.0,  # pixels: a curve of many points takes no more room than the panel can show
    "font.size": 9,
    "lines.markersize": 3.8,
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
    log: bool = False


PANELS = (
    Panel("Backbone MLM loss", "loss (nats)", ("train/mlm_loss", "val/mlm_loss")),
    Panel("Head MLM loss", "loss (nats)", ("train/head_mlm_loss", "val/head_mlm_loss")),
    Panel("Loss at [MASK] positions", "loss (nats)", ("val/mlm_loss_at_mask", "val/head_mlm_loss_at_mask", UNIGRAM)),
    Panel("Backbone MLM accuracy", "accuracy (%)", ("train/mlm_accuracy", "val/mlm_accuracy")),
    Panel("Head MLM accuracy", "accuracy (%)", ("train/head_mlm_accuracy", "val/head_mlm_accuracy")),
    Panel("Decoder loss", "loss (nats)", ("train/decoder_loss", "val/decoder_loss")),
    Panel("Decoder accuracy", "accuracy (%)", ("train/decoder_accuracy", "val/decoder_accuracy")),
    Panel("Contrast loss", "loss (nats)", ("train/contrast_loss", "val/contrast_loss")),
    Panel("Siblings found", "accuracy (%)", ("train/contrast_accuracy", "val/contrast_accuracy")),
    Panel("Siblings' rank", "mean reciprocal rank", ("train/contrast_mrr", "val/contrast_mrr")),
    Panel("Alignment of siblings", "squared distance", ("train/alignment", "val/alignment")),
    Panel("Uniformity of all", "log mean potential", ("train/uniformity", "val/uniformity")),
    Panel("Learning rate", "learning rate", ("train/lr",)),
    Panel("Gradient norm", "norm before clipping", ("train/grad_norm",), log=True),
    Panel("Throughput", "tokens/s", ("perf/tokens_per_second",)),
    Panel("Model FLOPs utilisation", "% of the peak", ("perf/mfu",)),
    Panel("Waiting for data", "% of the time", ("perf/data_wait_fraction",)),
    Panel("Head loss by the [CLS] it reads", "loss (nats)", tuple(f"probe/head_loss_{c}" for c in CLS_READ)),
    Panel("Zero-shot [CLS] retrieval, which usually falls", "score", tuple(f"probe/{m}" for m in RETRIEVED)),
)


def draw_panels(runs: Sequence[Curves], x_label: str) -> list[tuple[str, str]]:
    """(title, SVG) of every panel that at least one run has data for."""
    logged = {metric for curves in runs for metric in curves}
    return [(panel.title, draw(panel, runs, x_label)) for panel in panels_for(logged) if logged & set(panel.metrics)]


def panels_for(logged: set[str]) -> list[Panel]:
    layers = by_number(metric for metric in logged if metric.startswith(ENTROPY))
    panels = [*PANELS, Panel(ENTROPY_TITLE, "share of log n", tuple(layers))]
    others = sorted(logged - NOT_DRAWN - {metric for panel in panels for metric in panel.metrics})
    by_stem: defaultdict[str, list[str]] = defaultdict(list)
    for metric in others:
        by_stem[metric.rpartition("/")[2]].append(metric)
    for stem, metrics in by_stem.items():
        title = stem.replace("_", " ")
        panels.append(Panel(title.capitalize(), "loss (nats)" if "loss" in stem else title, tuple(metrics)))
    return panels


@matplotlib.rc_context(STYLE)
def draw(panel: Panel, runs: Sequence[Curves], x_label: str) -> str:
    axes = new_axes(xlabel=x_label, ylabel=plain(panel.unit), yscale="log" if panel.log else "linear")
    for curves, colour in zip(runs, run_colours(len(runs)), strict=True):
        for metric in panel.metrics:
            if metric in curves and metric != UNIGRAM:
                plot(axes, panel, metric, *curves[metric], colour)
    if UNIGRAM in panel.metrics:
        plot_unigram(axes, runs)
    elif "nats" in panel.unit:
        leave_out_start(axes)
    name_lines(axes, INK)
    if panel.unit == "tokens/s":
        axes.yaxis.set_major_formatter(short)
    return to_svg(axes.figure, panel.title)


def plot(axes: Axes, panel: Panel, metric: str, x: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Training: as logged and faint, in front the centred mean over 5 % of the curve."""
    shown = np.isfinite(values) & ((values > 0) | (not panel.log))
    x, values = x[shown], values[shown] * (100 if "%" in panel.unit else 1)
    width = len(x) // 20
    if metric.startswith(("train/", "perf/")) and metric != "train/lr" and width > 1:
        axes.plot(x, values, color=colour, lw=0.7, alpha=0.3)
        every = 1 + len(x) // 2000  # a panel shows no more points
        values = np.lib.stride_tricks.sliding_window_view(values, width)[::every].mean(axis=1)
        x = x[width // 2 :: every][: len(values)]
    axes.plot(x, values, color=colour, markevery=max(1, len(x) // 30), **style_of(panel, metric))


def style_of(panel: Panel, metric: str) -> dict[str, Any]:
    """Validation: dots, hollow for the head. Of a run's probes each has a name: a layer is paler the lower it is, all
    else is dashed."""
    if metric.startswith("val/head_"):
        return {"marker": "o", "mfc": PAPER, "ls": ":", "lw": 1, "zorder": 3}
    if metric.startswith("val/"):
        return {"marker": "o", "lw": 1, "zorder": 3}
    if metric.startswith("probe/"):
        number = panel.metrics.index(metric)
        layer = metric.startswith(ENTROPY)
        varied = {"alpha": (1 + number) / len(panel.metrics)} if layer else {"ls": DASHES[number % len(DASHES)]}
        name = re.split("[/_]", metric)[-1]  # of probe/cls_entropy_layer_3 3
        return {"marker": ".", "lw": 1.2, "label": name, **varied}
    return {"lw": 1.5}


def by_number(metrics: Iterable[str]) -> list[str]:
    return sorted(metrics, key=lambda metric: (len(metric), metric))  # layer_2 before layer_10


def plot_unigram(axes: Axes, runs: Sequence[Curves]) -> None:
    """One dashed line per distinct level: runs on the same validation text share it."""
    for level in sorted({round(float(curves[UNIGRAM][1][-1]), 2) for curves in runs if UNIGRAM in curves}):
        axes.axhline(level, color=INK, lw=1, ls="--")
        at = axes.get_yaxis_transform()
        axes.text(0.99, level, f"unigram {level:.2f}", transform=at, ha="right", va="bottom", fontsize=8)


def leave_out_start(axes: Axes) -> None:
    """End the y axis where the loss is after 5 % of the steps: the first fall would flatten all that follows."""
    x, values = (np.concatenate([line.get_data()[axis] for line in axes.lines]) for axis in (0, 1))
    later = values[x > 0.05 * x.max(initial=0)]
    if len(later) and later.max() > later.min():
        axes.set_ylim(top=later.max() + 0.08 * np.ptp(later), bottom=values.min() - 0.08 * np.ptp(later))


@matplotlib.rc_context(STYLE)
def draw_over(title: str, unit: str, theirs: Mapping[str, Curves], ours: Sequence[Curves]) -> str:
    """Runs in their colours over reference runs, which are dashed by what their label has before a comma. The x axis
    begins at 2 % of the shortest run: the first steps would take most of its decades."""
    axes = new_axes(xlabel="tokens seen", ylabel=unit, xscale="log")
    kinds = list(dict.fromkeys(label.partition(",")[0] for label in theirs))
    styled: list[tuple[Curves, dict[str, Any]]] = []
    for label, curves in theirs.items():
        n = kinds.index(label.partition(",")[0])
        line = {"ls": DASHES[n % len(DASHES)], "lw": 0.8 + n // len(DASHES), "label": kinds[n]}
        styled.append((curves, {"color": INK, "alpha": 0.45, **line}))
    for curves, colour in zip(ours, run_colours(len(ours)), strict=True):
        styled.append((curves, {"color": colour, "lw": 1.5, "marker": "o"}))
    drawn = [(*curves[title], style) for curves, style in styled if title in curves]
    start = 0.02 * min(x[-1] for x, _, _ in drawn)
    for x, values, style in drawn:
        shown = np.isfinite(values) & (x >= start)
        axes.plot(x[shown], values[shown], markevery=max(1, shown.sum() // 30), **style)
    name_lines(axes, INK)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return to_svg(axes.figure, title)


@matplotlib.rc_context(STYLE)
def draw_entropies(rows: Sequence[dict[str, Any]]) -> str:
    return to_svg(entropy_figure(rows), ENTROPY_TITLE)


def entropy_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """How widely [CLS] attends in each layer, before fine-tuning and (dashed) after it: a line for each row of an
    evaluation's attention, one colour for all seeds."""
    figure = Figure(figsize=(6.4, 2.7), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="share of log n", ylim=(0, 1.02))
    names = list(dict.fromkeys(in_words(row) for row in rows))
    colours = dict(zip(names, run_colours(len(names)), strict=True))
    for row in rows:
        values, name = row["cls_entropy"], in_words(row)
        style: Any = {"color": colours[name], "ls": "--" if row["trained_on"] else "-"}
        axes.plot(range(1, len(values) + 1), values, marker="o", ms=3, lw=1.5, label=name, **style)
    name_lines(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def new_axes(**options: Any) -> Axes:
    axes = Figure(figsize=(4.7, 2.7), layout="constrained").add_subplot(**options)
    axes.xaxis.set_major_formatter(short)
    return axes


def name_lines(axes: Axes, colour: str | None = None) -> None:
    """A legend beside the panel for the lines that have a label, each once; in this ``colour`` or in their own."""
    handles, labels = axes.get_legend_handles_labels()
    if named := dict(zip(map(plain, labels), handles, strict=True)):
        beside: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": 1 + (len(named) > 12)}
        legend = axes.legend(named.values(), named, frameon=False, fontsize=7, reverse=colour is not None, **beside)
        for line in legend.get_lines():
            line.set_color(colour or line.get_color())


def plain(text: str) -> str:
    """Without what matplotlib takes for formulas."""
    return text.replace("$", r"\$")


def run_colours(n: int) -> list[str]:
    if n <= len(OKABE_ITO):
        return list(OKABE_ITO[:n])
    return [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(0.2, 0.95, n))]


def short(value: float, _: Any = None) -> str:
    """1500 -> 1.5k, 2e9 -> 2B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.99995 * size:  # what four digits round up to it
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def to_svg(figure: Any, title: str) -> str:
    """Inline SVG: the page's colours, no namespaces (HTML needs none), no ids but those that it refers to itself."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids differ between the panels of one page
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg[svg.index("<svg") :])
    for stand_in, colour in ((INK, "currentColor"), (GRID, "var(--grid)"), (PAPER, "var(--paper)")):
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg", '<svg role="img"', 1)
