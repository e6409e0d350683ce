"""The study, cell by cell: pre-train each arm, export it, fine-tune and evaluate it. Started again, it goes on.

    python configs/study/study.py --wikipedia good.jsonl.xz featured.jsonl.xz --beir FOLDER --sts FOLDER [--minutes 10]

FOLDER of --beir holds squad, scifact and cranfield. Results: runs/study/ARM-seed=S/evaluation-*/results.json, all their
rows in runs/study/results.csv, and the curves in runs/study/report.html.
"""

import argparse
import csv
import json
import os
import sys
import threading
import time
from pathlib import Path

from condenser import signals
from condenser.cli import main

HERE = Path(__file__).parent
RUNS, STORE = Path("runs/study"), Path("data/tokens/study")
ARMS = {  # most telling first: (overlay, seeds)
    "mlm": (["mlm"], (1, 2)),
    "condenser": ([], (1, 2)),
    "no-late-mlm": (["no-late-mlm"], (1,)),
    "early-skip": (["early-skip"], (1,)),
    "late-skip": (["late-skip"], (1,)),
    "one-head-layer": (["one-head-layer"], (1,)),
}
TUNING = ["--finetune", "--finetune-learning-rate", "5e-4", "--finetune-batch-size", "64", "--max-length", "64"]


def study() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikipedia", nargs="+", type=Path, required=True, help="text to pre-train on")
    parser.add_argument("--beir", type=Path, required=True, help="folder of squad, scifact and cranfield")
    parser.add_argument("--sts", type=Path, required=True, help="folder of the STS benchmark")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=1e5, help="stop after about so long")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if not (STORE / "manifest.json").is_file():
        settings = ["--tokenizer", "train:8192", "--max-length", "64", "--output", str(STORE)]
        run("prepare", "--input", *map(str, options.wikipedia), *settings)
    runs = [(arm, seed) for arm in options.arms for seed in ARMS[arm][1]]
    for arm, seed in runs:
        folder = RUNS / f"{arm}-seed={seed}"
        if not pre_trained(arm, seed, folder, end):
            return
        run("export", str(folder), "--output", str(folder / "export"))
        for name, cell in cells(options.beir, options.sts).items():
            if time.monotonic() > end:
                return
            run("evaluate", str(folder / "export"), "--output", str(folder / f"evaluation-{name}"), *cell, *TUNING)
    collect(runs)


def pre_trained(arm: str, seed: int, folder: Path, end: float) -> bool:
    """Whether the arm has been trained to its end; at the end of the time it is asked to stop, and goes on later."""
    overlays = [word for name in ARMS[arm][0] for word in ("-c", str(HERE / f"{name}.yaml"))]
    settings = ["--name", folder.name, "--seed_everything", str(seed)]
    if not (folder / "summary.json").is_file() and time.monotonic() < end:
        alarm = threading.Timer(end - time.monotonic(), os.kill, (os.getpid(), signals.STOP))
        alarm.daemon = True
        alarm.start()
        run("fit", "--config", str(HERE / "study.yaml"), *overlays, *settings)
        alarm.cancel()
    return (folder / "summary.json").is_file()


def cells(beir: Path, sts: Path) -> dict[str, list[str]]:
    squad, scifact, cranfield = (str(beir / name) for name in ("squad", "scifact", "cranfield"))
    few = ["--finetune-steps", "300", "--seeds", "0", "1", "2"]
    return {
        "scifact": ["--retrieval", scifact, cranfield, "--attention", str(STORE), *few],
        "sts": ["--similarity", str(sts), "--train-sizes", "500", "1000", "all", *few],
        "squad": ["--retrieval", squad, "--queries", "2000", "--train-sizes", "1000", "10000", "--finetune-steps=500"],
    }


def collect(runs: list[tuple[str, int]]) -> None:
    """All rows of all runs in one file, and the curves of all in one report."""
    rows = []
    for arm, seed in runs:
        for path in sorted((RUNS / f"{arm}-seed={seed}").glob("evaluation-*/results.json")):
            rows += [{"arm": arm, "pre-training seed": seed, **row} for row in json.loads(path.read_text())["rows"]]
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(RUNS / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    folders = [str(RUNS / f"{arm}-seed={seed}") for arm, seed in runs]
    run("report", *folders, "--output", str(RUNS / "report.html"))
    print(f"wrote {RUNS / 'results.csv'}: {len(rows)} rows of {len(runs)} runs")


def run(*command: str) -> None:
    print(f"\n$ condenser {' '.join(command)}", flush=True)
    if (code := main(command)) not in (0, signals.STOPPED):
        sys.exit(code)


if __name__ == "__main__":
    study()
