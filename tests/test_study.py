"""The study's script: it goes on where it was stopped, and its table is made of what the cells wrote."""

import importlib.util
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from condenser.reports.reference import read_reference

FOLDER = Path(__file__).parents[1] / "configs" / "study"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The script, writing into a temporary folder."""
    spec = importlib.util.spec_from_file_location("study", FOLDER / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module.reference, "STUDY", tmp_path / "reference.csv")
    return module


def cell(study, arm, seed, name, rows):
    folder = study.RUNS / f"{arm}-seed={seed}" / f"evaluation-{name}"
    folder.mkdir(parents=True)
    blank = dict.fromkeys((*study.ABOUT, "fine_tuned")) | {"model": "pre-trained"}
    (folder / "results.json").write_text(json.dumps({"rows": [blank | row for row in rows]}))


def found(collection, value, **about):
    tuned = "trained_on" in about
    return {"task": "retrieval", "collection": collection, "ndcg@10": value, "fine_tuned": tuned} | about


def test_the_table_has_mean_and_spread_of_all_seeds_beside_the_floor(study, run, capsys):
    for seed in (1, 2):
        shutil.copytree(run, study.RUNS / f"mlm-seed={seed}")
        rows = [found("scifact", seed + tuning / 10, trained_on="scifact", seed=tuning) for tuning in (0, 1)]
        cell(study, "mlm", seed, "scifact", [*rows, found("scifact", 0.3), found("scifact", 0.68, model="BM25")])
    cell(study, "mlm", 1, "squad", [found("squad", 0.25, trained_on="squad", train_size=1000, seed=0)])
    cell(study, "condenser", 1, "squad", [found("squad", 0.9, trained_on="squad", train_size=1000)])  # not trained
    study.collect()
    lines = capsys.readouterr().out.split("\n\n")[-1].strip().split("\n")
    header, _, bm25, mlm = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert bm25[header.index("SciFact")] == "0.680 ± 0.000"
    assert mlm[header.index("SciFact")] == "1.550 ± 0.580"
    assert mlm[header.index("SQuAD, 1,000")] == "0.250"
    assert not {"10,000", "STS-B, all"} & set(header)  # nothing was measured
    loss = json.loads((run / "summary.json").read_text())["final"]["val/mlm_loss_at_mask"]
    assert mlm[header.index("MLM loss")] == f"{loss:.3f} ± 0.000"
    assert set(read_reference(study.reference.STUDY)) == {"mlm, seed 1", "mlm, seed 2"}
    kept = pd.read_csv(study.HERE / "results.csv", dtype={"train_size": str})
    assert study.table(kept).split("\n") == lines


def test_without_time_nothing_is_started_and_what_there_is_is_told(study, monkeypatch):
    started = []
    monkeypatch.setattr(study, "run", lambda *command: started.append(command[0]))
    monkeypatch.setattr(study, "STORE", study.HERE)
    (study.HERE / "manifest.json").touch()
    monkeypatch.setattr("sys.argv", ["study.py", *["--wikipedia", "a", "--beir", "b", "--sts", "c", "--minutes", "0"]])
    with pytest.raises(SystemExit, match="no arm is trained yet"):
        study.study()
    assert not started


def test_an_arm_differs_from_the_first_in_what_its_name_says_and_nothing_else(study):
    changed = {
        name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in study.ARMS if name != "condenser"
    }
    assert {name: config.pop("model") for name, config in changed.items()} == {
        "mlm": {"n_head_layers": 0},
        "no-late-mlm": {"late_mlm": False},
        "early-skip": {"skip_from": 1},
        "frozen-early": {"skip_from": 1, "n_head_layers": 1, "freeze_layers": 1},
        "late-skip": {"skip_from": 3},
        "one-head-layer": {"n_head_layers": 1},
    }
    assert all(config == {"name": name} for name, config in changed.items())
