"""A study, piece by piece: pre-train each arm, export it, fine-tune and evaluate it. Started again, it goes on.

    python configs/study/study.py configs/study/scratch/plan.yaml --wikipedia good.jsonl.xz featured.jsonl.xz \\
        --beir FOLDER --sts FOLDER [--minutes 8]

A plan says how text is prepared, which arms there are with their overlays and seeds, what each starts from, and how all
are evaluated. FOLDER of --beir holds squad, scifact and cranfield. A piece is what fits into --minutes: training stops
at a checkpoint, an evaluation after the rows that are done. Any number of processes, one for each GPU say, work on one
study side by side, each at another cell. At the end the rows of all cells go to a CSV beside the plan, curves to a
report (and to the reference that the plan names, see condenser/reports/reference.py), and a table is printed.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from condenser.cli import main
from condenser.cluster import signals
from condenser.data.lock import locked
from condenser.data.store import write_json
from condenser.evaluation.evaluate import mean_and_spread
from condenser.reports import reference
from condenser.runs import METRICS, SUMMARY, read_metrics

ABOUT = ("task", "collection", "model", "pooling", "whitening", "trained_on", "seed", "train_size")  # of a row
METRICS_KEPT = ("ndcg@10", "ndcg@10_unseen", "mrr@10", "recall@100", "map", "spearman", "alignment", "uniformity")
OTHER, READ = "probe/head_loss_other", "probe/read_from_cls"  # what is lost with another text's [CLS]
STOPPED = (signals.STOPPED, signals.AGAIN, 130)  # what a command ends with that was asked to stop, or interrupted


@dataclass
class Arm:
    """A kind of run: the plan's recipe with ``overlays``, files beside it."""

    overlays: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1])
    start: str | None = None  # the arm whose export it starts from, of the same seed or of the only one
    evaluated: bool = True


class Study:
    """A plan, where its runs are, what the words BEIR, STS and STORE of its commands stand for, and when to stop."""

    def __init__(self, path: Path, places: dict[str, str], minutes: float):
        self.folder = path.parent
        self.plan: dict[str, Any] = yaml.safe_load(path.read_text())
        self.results = self.folder / self.plan["results"]
        self.arms = {name: Arm(**(settings or {})) for name, settings in self.plan["arms"].items()}
        self.runs = Path(self.plan["runs_dir"])
        self.store = Path(self.plan["store"])
        self.places = places | {"STORE": str(self.store)}
        self.end = time.monotonic() + 60 * minutes

    def is_over(self) -> bool:
        return time.monotonic() >= self.end

    def run_of(self, arm: str, seed: int) -> Path:
        return self.runs / f"{arm}-seed={seed}"

    def started_from(self, arm: str, seed: int) -> Path | None:
        """The run whose export an arm starts from."""
        start = self.arms[arm].start
        if start is None:
            return None
        seeds = self.arms[start].seeds
        return self.run_of(start, seed if seed in seeds else seeds[0])


def study() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="configs/study/scratch/plan.yaml, configs/study/warm/gpu.yaml, ...")
    parser.add_argument("--wikipedia", nargs="+", required=True, help="text to pre-train on")
    parser.add_argument("--beir", required=True, help="folder of squad, scifact and cranfield")
    parser.add_argument("--sts", required=True, help="folder of the STS benchmark")
    parser.add_argument("--arms", nargs="+", help="some of the plan's; all by default")
    parser.add_argument("--minutes", type=float, default=1e5, help="stop after about so long")
    options = parser.parse_args()
    sys.path.insert(0, str(options.plan.parent))  # for objectives of the study's own
    plan = Study(options.plan, {"BEIR": options.beir, "STS": options.sts}, options.minutes)
    if unknown := set(options.arms or ()) - plan.arms.keys():
        parser.error(f"no arms {', '.join(sorted(unknown))}; there are {', '.join(plan.arms)}")
    with at_work(plan, "store") as free:
        if free and not plan.is_over():  # of a store that is there it says whether the plan's settings made it
            words = map(str, plan.plan["prepare"])  # some are numbers
            run(plan, "prepare", "--input", *options.wikipedia, *words, "--output", str(plan.store))
    if not (plan.store / "manifest.json").is_file():
        sys.exit("the text is not prepared yet: start again to go on")
    for arm in options.arms or plan.arms:
        for seed in plan.arms[arm].seeds:
            work_on(plan, arm, seed)
    collect(plan)


@contextlib.contextmanager
def at_work(plan: Study, cell: str) -> Iterator[bool]:
    """Whether this process has a cell to itself; else another is at it."""
    (plan.runs / "locks").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(plan.runs / "locks" / cell, "at work: {holder}"))
        except ValueError as error:
            print(f"{cell}: {error}")
            yield False
        else:
            yield True


def work_on(plan: Study, arm: str, seed: int) -> None:
    """Pre-train and evaluate, as far as the time allows."""
    folder = plan.run_of(arm, seed)
    with at_work(plan, folder.name) as free:
        if not (free and pre_trained(plan, arm, seed)):
            return
        run(plan, "export", str(folder), "--output", str(folder / "export"))
    cells = plan.plan["cells"] if plan.arms[arm].evaluated else {}
    for name, parts in cells.items():
        command = [replaced(word, plan.places) for part in parts for word in part.split()]
        if folder == first_run(plan) and name in plan.plan["baselines"]:
            command.append("--baselines")
        if not plan.is_over():
            with at_work(plan, f"{folder.name}-{name}") as free:
                if free:
                    evaluated(plan, folder, name, command)


def replaced(word: str, places: dict[str, str]) -> str:
    """BEIR/squad -> FOLDER/squad"""
    first, _, rest = word.partition("/")
    return "/".join([places[first], rest]).rstrip("/") if first in places else word


def first_run(plan: Study) -> Path:
    """Beside its rows stand BM25's, and those of the same model with random weights."""
    arm = next(name for name, each in plan.arms.items() if each.evaluated)
    return plan.run_of(arm, plan.arms[arm].seeds[0])


def pre_trained(plan: Study, arm: str, seed: int) -> bool:
    """Whether the arm has been trained to its end; at the end of the time it is asked to stop, and goes on later."""
    folder, start = plan.run_of(arm, seed), plan.started_from(arm, seed)
    command = ["--name", folder.name, "--runs_dir", str(plan.runs), "--seed_everything", str(seed)]
    if start is not None:
        if not (start / "export").is_dir():
            print(f"{folder.name} waits for {start.name}")
            return False
        command += ["--model.backbone", str(start / "export"), "--model.backbone_config", "{}"]
    files = [plan.folder / name for name in (plan.plan["recipe"], *plan.arms[arm].overlays)]
    configs = ["--config", str(files[0]), *(word for file in files[1:] for word in ("-c", str(file)))]
    note, done = folder.with_name(f"{folder.name}.fit.json"), [*command, *(file.read_text() for file in files)]
    if not is_noted(note, done, folder / SUMMARY) and not plan.is_over():
        with alarm(plan.end, signals.STOP):
            run(plan, "fit", *configs, *command)  # which refuses settings that have changed
        if (folder / SUMMARY).is_file():
            write_json(note, done)
    return (folder / SUMMARY).is_file()


def evaluated(plan: Study, folder: Path, name: str, command: list[str]) -> None:
    """What is done is noted with its command; what is interrupted keeps the rows that it has."""
    output = folder / f"evaluation-{name}"
    note = folder / f"evaluation-{name}.command.json"  # beside, as the folder is its command's alone
    if is_noted(note, command, output / "results.json"):
        return
    with alarm(plan.end, signal.SIGINT):
        code = run(plan, "evaluate", str(folder / "export"), "--output", str(output), *command)
    if code == 0:
        write_json(note, command)


def is_noted(note: Path, done: list[str], result: Path) -> bool:
    """Whether that was done which a note says, and what came of it is still there."""
    return result.is_file() and note.is_file() and json.loads(note.read_text()) == done


@contextlib.contextmanager
def alarm(end: float, number: int) -> Iterator[None]:
    """Sends this process a signal at the end of the time."""
    timer = threading.Timer(max(0.0, end - time.monotonic()), os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def collect(plan: Study) -> None:
    """All measurements so far in one file, all curves in another and in a report."""
    runs = {(arm, seed): plan.run_of(arm, seed) for arm, each in plan.arms.items() for seed in each.seeds}
    done = {run: folder for run, folder in runs.items() if (folder / SUMMARY).is_file()}
    if not done:
        sys.exit("no arm is trained yet: start again to go on")
    rows = [(*run, *row) for run, folder in done.items() for row in measurements(folder, plan.plan["cells"])]
    results = pd.DataFrame(rows, columns=["arm", "pretrain_seed", *ABOUT, "metric", "value"], dtype=object)
    results = results.astype({"value": float}).drop_duplicates()  # sizes stay whole numbers, "all" or None
    results.to_csv(plan.results, index=False, float_format="%.5g")
    left = len(runs) - len(done)
    if not left and (name := plan.plan.get("reference")):
        named = {f"{arm}, seed {seed}": done[arm, seed] for arm, seed in done if plan.arms[arm].evaluated}
        reference.write_reference(reference.STUDIES[name], named)
    run(plan, "report", *map(str, done.values()), "--output", str(plan.runs / "report.html"))
    print(f"\nwrote {plan.results}: {len(rows)} rows of {len(done)} runs, {left} runs to go\n")
    print(table(results, plan.plan["columns"]))
    for name, metric in plan.plan["intervals"].items():  # paired by query and seeds
        patterns = [f"{arm}-seed=*/evaluation-{name}" for arm in plan.plan["compared"]]
        if all(any(plan.runs.glob(pattern)) for pattern in patterns):
            run(plan, "evaluate", "compare", *(str(plan.runs / pattern) for pattern in patterns), "--metric", metric)


def measurements(folder: Path, cells: Iterable[str]) -> Iterator[tuple[object, ...]]:
    """What was measured on (see ABOUT), the metric, and its value: the last of training, and of these evaluations."""
    last = {name: float(values[-1]) for name, (_, values) in read_metrics(folder / METRICS).items()}
    if OTHER in last:
        last[READ] = last[OTHER] - last["probe/head_loss_true"]
    for name, value in last.items():
        if name.startswith(("val/", "probe/head_loss", READ)):
            yield "pre-training", *[None] * (len(ABOUT) - 1), name, value
    files = (folder / f"evaluation-{name}" / "results.json" for name in sorted(cells))
    for path in filter(Path.is_file, files):
        for row in json.loads(path.read_text())["rows"]:
            size = row["train_size"] or ("all" if row["fine_tuned"] else None)
            about = [(row | {"train_size": size})[name] for name in ABOUT]
            found = {f"cls_entropy_layer_{n}": value for n, value in enumerate(row.get("cls_entropy", ()), start=1)}
            found |= {name: row[name] for name in METRICS_KEPT if row.get(name) is not None}
            yield from ((*about, name, value) for name, value in found.items())


def table(results: pd.DataFrame, columns: dict[str, str]) -> str:
    """Markdown: mean and standard deviation over the seeds of pre-training and of fine-tuning.

    Args:
        columns: by name, which measurements are of it, as `pandas.DataFrame.query` takes it.
    """
    sizes = results["train_size"].astype(object).fillna("None").astype(str)
    random = results["model"].astype(object).str.startswith(("BM25", "random"), na=False)
    results = results.assign(row=results["model"].where(random, results["arm"]), size=sizes)
    measured = {name: found for name, condition in columns.items() if not (found := results.query(condition)).empty}
    lines = ["| | " + " | ".join(measured) + " |", "| --- |" + " --- |" * len(measured)]
    for row in dict.fromkeys([*results["row"][random], *results["row"][~random]]):
        cells = (mean_and_spread(found["value"][found["row"] == row].tolist()) for found in measured.values())
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("-0.000", "0.000")


def run(plan: Study, *command: str) -> int:
    """A command that may be stopped at the end of the time, but not fail; stopped before it, the study ends too."""
    print(f"\n$ condenser {' '.join(command)}", flush=True)
    code = main(command)
    if code != 0 and not (code in STOPPED and plan.is_over()):
        sys.exit(code)
    return code


if __name__ == "__main__":
    study()
