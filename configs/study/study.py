"""The study, cell by cell: pre-train each arm, export it, fine-tune and evaluate it. Started again, it goes on.

    python configs/study/study.py --wikipedia good.jsonl.xz featured.jsonl.xz --beir FOLDER --sts FOLDER [--minutes 10]

FOLDER of --beir holds squad, scifact and cranfield. Every cell's rows are in runs/study/ARM-seed=S/evaluation-*; at the
end the rows of all cells go to results.csv beside this file, the curves to condenser/reports/reference.csv and
runs/study/report.html, and the table of docs/study.md is printed. Arms may run side by side (--arms mlm, --arms
condenser).
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from condenser.cli import main
from condenser.cluster import signals
from condenser.reports import reference
from condenser.runs import METRICS, read_metrics

HERE = Path(__file__).parent
RUNS, STORE = Path("runs/study"), Path("data/tokens/study")
ARMS = {  # overlays of study.yaml, which itself is the second; most telling first, with the seeds of pre-training
    "mlm": (1, 2),
    "condenser": (1, 2),
    "no-late-mlm": (1,),
    "early-skip": (1,),
    "frozen-early": (1,),
    "late-skip": (1,),
    "one-head-layer": (1,),
}
TUNING = ["--finetune", "--finetune-learning-rate", "5e-4", "--finetune-batch-size", "64"]
TUNING += ["--finetune-epochs", "10"]
FLOOR = ("mlm", 1)  # beside this run's rows: BM25, and the same model with random weights
ABOUT = ("task", "collection", "model", "pooling", "whitening", "trained_on", "seed", "train_size")  # of a row
METRICS_KEPT = ("ndcg@10", "ndcg@10_unseen", "mrr@10", "recall@100", "map", "spearman", "alignment", "uniformity")
FOUND = "metric == 'ndcg@10' and (model.str.startswith('BM25') or"
COLUMNS = {  # of the table
    "MLM loss": "metric == 'val/mlm_loss_at_mask'",
    "head's": "metric == 'val/head_mlm_loss_at_mask'",
    "SQuAD, 1,000": f"{FOUND} size == '1000') and collection == 'squad'",
    "10,000": f"{FOUND} size == '10000') and collection == 'squad'",
    "SciFact": f"{FOUND} trained_on == 'scifact') and collection == 'scifact'",
    "unseen": f"{FOUND} trained_on == 'scifact') and collection == 'scifact'".replace("ndcg@10", "ndcg@10_unseen"),
    "Cranfield": f"{FOUND} trained_on == 'scifact') and collection == 'cranfield'",
    "STS-B, 500": "metric == 'spearman' and size == '500'",
    "STS-B, 1,000": "metric == 'spearman' and size == '1000'",
    "STS-B, all": "metric == 'spearman' and size == 'all'",
}


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
    for arm in options.arms:
        for seed in ARMS[arm]:
            evaluated(arm, seed, options, end)
    collect()
    for name, metric in {"scifact": "ndcg@10", "squad": "ndcg@10", "sts": "spearman"}.items():
        mlm, condenser = (str(RUNS / f"{arm}-seed=*" / f"evaluation-{name}") for arm in ("mlm", "condenser"))
        main(["evaluate", "compare", mlm, condenser, "--metric", metric])  # paired by query and seeds, with intervals


def evaluated(arm: str, seed: int, options: argparse.Namespace, end: float) -> None:
    """Pre-train and evaluate, as far as the time allows."""
    folder = RUNS / f"{arm}-seed={seed}"
    if not pre_trained(arm, seed, folder, end):
        return
    run("export", str(folder), "--output", str(folder / "export"))
    for name, cell in cells(options.beir, options.sts).items():
        if time.monotonic() < end:
            floor = ["--baselines"] if (arm, seed) == FLOOR and name != "sts" else []
            output = ["--output", str(folder / f"evaluation-{name}")]
            run("evaluate", str(folder / "export"), *output, *cell, "--max-length", "64", *floor)


def pre_trained(arm: str, seed: int, folder: Path, end: float) -> bool:
    """Whether the arm has been trained to its end; at the end of the time it is asked to stop, and goes on later."""
    overlay = [] if arm == "condenser" else ["-c", str(HERE / f"{arm}.yaml")]
    settings = ["--name", folder.name, "--seed_everything", str(seed)]
    if not (folder / "summary.json").is_file() and time.monotonic() < end:
        alarm = threading.Timer(end - time.monotonic(), os.kill, (os.getpid(), signals.STOP))
        alarm.daemon = True
        alarm.start()
        run("fit", "--config", str(HERE / "study.yaml"), *overlay, *settings)
        alarm.cancel()
    return (folder / "summary.json").is_file()


def cells(beir: Path, sts: Path) -> dict[str, list[str]]:
    squad, scifact, cranfield = (str(beir / name) for name in ("squad", "scifact", "cranfield"))
    twice = [*TUNING, "--seeds", "0", "1"]
    return {
        "scifact": ["--retrieval", scifact, cranfield, "--attention", str(STORE), *twice],
        "sts": ["--similarity", str(sts), "--train-sizes", "500", "1000", "all", *twice],
        "squad": ["--retrieval", squad, "--queries", "2000", "--train-sizes", "1000", "10000", *TUNING],
        "pooling": ["--retrieval", cranfield, "--pooling", "cls", "mean", "--whitening", "0"],
    }


def collect() -> None:
    """All measurements so far in one file, all curves in another and in a report."""
    runs = {(arm, seed): RUNS / f"{arm}-seed={seed}" for arm in ARMS for seed in ARMS[arm]}
    done = {run: folder for run, folder in runs.items() if (folder / "summary.json").is_file()}
    if not done:
        sys.exit("no arm is trained yet: start again to go on")
    rows = [(*run, *row) for run, folder in done.items() for row in measurements(folder)]
    results = pd.DataFrame(rows, columns=["arm", "pretrain_seed", *ABOUT, "metric", "value"]).drop_duplicates()
    results.to_csv(HERE / "results.csv", index=False, float_format="%.5g")
    reference.write_reference(reference.STUDY, {f"{arm}, seed {seed}": folder for (arm, seed), folder in done.items()})
    run("report", *map(str, done.values()), "--output", str(RUNS / "report.html"))
    print(f"\nwrote {HERE / 'results.csv'}: {len(rows)} rows of {len(done)} runs\n\n{table(results)}")


def measurements(folder: Path) -> Iterator[tuple[object, ...]]:
    """What was measured on (see ABOUT), the metric, and its value: the last of training, and all evaluations."""
    for name, (_, values) in read_metrics(folder / METRICS).items():
        if name.startswith(("val/", "probe/head_loss")):
            yield "pre-training", *[None] * (len(ABOUT) - 1), name, float(values[-1])
    for path in sorted(folder.glob("evaluation-*/results.json")):
        for row in json.loads(path.read_text())["rows"]:
            about = [row[name] for name in ABOUT[:-1]]
            size = row["train_size"] or ("all" if row["fine_tuned"] else None)
            entropies = enumerate(row.get("cls_entropy", ()), start=1)
            found = {f"cls_entropy_layer_{layer}": value for layer, value in entropies}
            found |= {name: row[name] for name in METRICS_KEPT if row.get(name) is not None}
            yield from ((*about, size, name, value) for name, value in found.items())


def table(results: pd.DataFrame) -> str:
    """Markdown: mean and standard deviation over the seeds of pre-training and of fine-tuning."""
    random = results["model"].str.startswith(("BM25", "random"), na=False)
    results = results.assign(row=results["model"].where(random, results["arm"]), size=results["train_size"].astype(str))
    measured = {name: found for name, condition in COLUMNS.items() if not (found := results.query(condition)).empty}
    lines = ["| | " + " | ".join(measured) + " |", "| --- |" + " --- |" * len(measured)]
    for row in dict.fromkeys([*results["row"][random], *results["row"][~random]]):
        cells = (spread(found["value"][found["row"] == row]) for found in measured.values())
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: pd.Series) -> str:
    if values.empty:
        return ""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def run(*command: str) -> None:
    print(f"\n$ condenser {' '.join(command)}", flush=True)
    if (code := main(command)) not in (0, signals.STOPPED):
        sys.exit(code)


if __name__ == "__main__":
    study()
