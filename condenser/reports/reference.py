"""Reference curves: the validation losses and probes of known runs over the tokens they saw, in one small CSV.

    condenser report runs/my-condenser --reference study --output report.html

A row is one measurement of one run: ``run`` (a label; what stands before a comma names the kind of run, as in
"condenser, seed 1"), ``tokens`` seen, then the metrics, empty where one was not measured. The files of the two studies
are part of the package; ``write_reference`` makes another.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from condenser.reports.figures import CLS_READ, ENTROPY, UNIGRAM, by_number
from condenser.runs import METRICS, Curves, in_order, parse_row, read_metrics

STUDIES = {  # of configs/study, by the name that `report --reference` takes
    "study": Path(__file__).with_name("reference.csv"),
    "warm": Path(__file__).with_name("reference-warm.csv"),
}
LOSSES = ("val/mlm_loss", "val/mlm_loss_at_mask", "val/head_mlm_loss", "val/head_mlm_loss_at_mask", UNIGRAM)
FOUND = "val/contrast_accuracy"
KEPT = (*LOSSES, *(f"probe/head_loss_{cls}" for cls in CLS_READ), FOUND)  # and entropies, as many as there are layers
COMPARED = (  # title, unit, minuend, subtrahend: losses differ with vocabulary and text, these hardly do
    ("Backbone: below guessing by frequency", "nats at [MASK]", UNIGRAM, "val/mlm_loss_at_mask"),
    ("Head: below guessing by frequency", "nats at [MASK]", UNIGRAM, "val/head_mlm_loss_at_mask"),
    ("What the head reads from [CLS]", "nats lost with another's", "probe/head_loss_other", "probe/head_loss_true"),
)
SIBLINGS = "Contrast: siblings that are found"
MEAN_ENTROPY = "[CLS] attention entropy, mean of the layers"
PANELS = {title: unit for title, unit, *_ in COMPARED} | {SIBLINGS: "share", MEAN_ENTROPY: "share of log n"}


def write_reference(path: Path, runs: Mapping[str, Path]) -> None:
    """Write the curves of run folders, given by label."""
    curves = {label: over_tokens(read_metrics(folder / METRICS), str(folder)) for label, folder in runs.items()}
    logged = set().union(*curves.values())
    metrics = [*KEPT, *by_number(metric for metric in logged if metric.startswith(ENTROPY))]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["run", "tokens", *metrics], restval="", lineterminator="\n")
        writer.writeheader()
        for label, found in curves.items():
            rows: defaultdict[int, dict[str, str]] = defaultdict(dict)
            for metric in found.keys() & set(metrics):
                for tokens, value in zip(*found[metric], strict=True):
                    rows[round(tokens)][metric] = f"{value:.5g}"
            writer.writerows({"run": label, "tokens": tokens, **rows[tokens]} for tokens in sorted(rows))


def read_reference(path: Path) -> dict[str, Curves]:
    """Curves over tokens by run."""
    points: defaultdict[str, defaultdict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header[:2] != ["run", "tokens"]:
            raise ValueError(f"{path} does not begin with run,tokens: is it a file that write_reference wrote?")
        for run, *cells in filter(None, reader):
            try:
                tokens, row = parse_row(["step", *header[2:]], cells)
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
            for metric, value in row.items():
                points[run][metric].append((tokens, value))
    if not points:
        raise ValueError(f"{path} holds no values")
    return {run: {name: in_order(*np.array(xy).T) for name, xy in curves.items()} for run, curves in points.items()}


def over_tokens(curves: Curves, name: str) -> Curves:
    """The curves of a run, by step, over the tokens it had seen."""
    if "train/tokens_seen" not in curves:
        raise ValueError(f"{name} logged no train/tokens_seen: leave out --x tokens and --reference")
    at, seen = curves["train/tokens_seen"]
    steps, tokens = np.concatenate([[-1], at]), np.concatenate([[0], seen])  # after step 0 there are some already
    return {metric: (np.interp(x, steps, tokens), values) for metric, (x, values) in curves.items()}


def comparable(curves: Curves) -> Curves:
    """What can be compared with runs on other text, by the title of its panel."""
    found = {
        title: (curves[less][0], np.interp(curves[less][0], *curves[more]) - curves[less][1])
        for title, _, more, less in COMPARED
        if {more, less} <= curves.keys()
    }
    if FOUND in curves:
        found[SIBLINGS] = curves[FOUND]
    if layers := [points for metric, points in curves.items() if metric.startswith(ENTROPY)]:
        x = layers[0][0]
        found[MEAN_ENTROPY] = x, np.mean([np.interp(x, *points) for points in layers], axis=0)
    return found
