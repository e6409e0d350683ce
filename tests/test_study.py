"""The studies' script: plans that hold together, pieces that go on, tables of what was measured."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from test_backbones import MODELS
from test_model import tiny_batch

from condenser.cli import main
from condenser.data.lock import locked
from condenser.models.condenser import Condenser
from condenser.reports.reference import STUDIES, read_reference
from condenser.runs import checkpoints

FOLDER = Path(__file__).parents[1] / "configs" / "study"
PLANS = sorted([*FOLDER.glob("*/plan.yaml"), *FOLDER.glob("*/[cg]pu.yaml")])
WORDS = ["--wikipedia", "a", "--beir", "b", "--sts", "c"]
TOY = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def study(monkeypatch):
    spec = importlib.util.spec_from_file_location("study", FOLDER / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "study", module)
    monkeypatch.syspath_prepend(str(FOLDER / "warm"))
    return module


def written(folder, plan=FOLDER / "scratch" / "plan.yaml", **changes):
    """A plan of its own folder, with the overlays of that one."""
    shutil.copytree(plan.parent, folder, dirs_exist_ok=True)
    settings = yaml.safe_load(plan.read_text()) | {"runs_dir": str(folder / "runs"), "store": str(folder / "store")}
    (folder / "plan.yaml").write_text(yaml.safe_dump(settings | changes, sort_keys=False))
    return folder / "plan.yaml"


def opened(study, path, minutes=100.0):
    return study.Study(path, {"BEIR": "beir", "STS": "sts"}, minutes)


def cell(plan, arm, seed, name, rows):
    folder = plan.run_of(arm, seed) / f"evaluation-{name}"
    folder.mkdir(parents=True)
    blank = dict.fromkeys(("pooling", "whitening", "trained_on", "seed", "train_size")) | {"model": "pre-trained"}
    (folder / "results.json").write_text(json.dumps({"rows": [blank | row for row in rows]}))


def found(collection, value, **about):
    tuned = "trained_on" in about
    return {"task": "retrieval", "collection": collection, "ndcg@10": value, "fine_tuned": tuned} | about


def test_the_table_has_mean_and_spread_of_all_seeds_beside_the_floor(study, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STUDIES, "study", tmp_path / "reference.csv")
    plan = opened(study, written(tmp_path, intervals={}))
    for seed in (1, 2):
        shutil.copytree(run, plan.run_of("mlm", seed))
        rows = [found("scifact", seed + tuning / 10, trained_on="scifact", seed=tuning) for tuning in (0, 1)]
        cell(plan, "mlm", seed, "scifact", [*rows, found("scifact", 0.3), found("scifact", 0.68, model="BM25")])
    cell(plan, "mlm", 1, "squad", [found("squad", 0.25, trained_on="squad", train_size=1000, seed=0)])
    cell(plan, "condenser", 1, "squad", [found("squad", 0.9, trained_on="squad", train_size=1000)])  # not trained
    cell(plan, "mlm", 1, "as-it-was-called", [found("scifact", 7.0, trained_on="scifact", seed=0)])
    study.collect(plan)
    assert not STUDIES["study"].exists()  # the curves of a part would take the place of all
    said = capsys.readouterr().out
    assert f"wrote {plan.results}: " in said
    lines = [line for line in said.split("\n\n")[-1].split("\n") if line.startswith("|")]
    header, _, bm25, mlm = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert bm25[header.index("SciFact")] == "0.680 ± 0.000"
    assert mlm[header.index("SciFact")] == "1.550 ± 0.580"
    assert mlm[header.index("SQuAD, 1,000")] == "0.250"
    assert not {"10,000", "STS-B, all"} & set(header)  # nothing was measured
    loss = json.loads((run / "summary.json").read_text())["final"]["val/mlm_loss_at_mask"]
    assert mlm[header.index("MLM loss")] == f"{loss:.3f} ± 0.000"
    plan.arms = {"mlm": plan.arms["mlm"]}
    study.collect(plan)
    assert set(read_reference(STUDIES["study"])) == {"mlm, seed 1", "mlm, seed 2"}
    kept = pd.read_csv(plan.results, dtype={"train_size": str})
    assert study.table(kept, plan.plan["columns"]).split("\n") == lines


def test_the_table_tells_an_encoder_as_it_is_from_a_fine_tuned_one(study):
    rows = [("a", "pre-trained", None, 0.25), ("a", "pre-trained", 1000, 0.5), ("a", "BM25", None, 0.75)]
    results = pd.DataFrame(rows, columns=["arm", "model", "train_size", "value"], dtype=object)
    columns = {"as it is": "size == 'None'", "after 1,000": "size == '1000'"}
    table = study.table(results.astype({"value": float}), columns)
    assert table.split("\n")[2:] == ["| BM25 | 0.750 |  |", "| a | 0.250 | 0.500 |"]


def test_without_time_nothing_is_started_and_what_there_is_is_told(study, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(study, "run", lambda plan, *command: started.append(command[0]))
    path = written(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    monkeypatch.setattr("sys.argv", ["study.py", str(path), *WORDS, "--minutes", "0"])
    with pytest.raises(SystemExit, match="no arm is trained yet"):
        study.study()
    assert not started


@pytest.mark.parametrize("path", PLANS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_plan_holds_together(path, study):
    """Overlays are there, a start comes before what starts from it, commands parse, columns are questions."""
    from condenser.cli import COMMANDS, function_parser, load

    plan = opened(study, path)
    names = list(plan.arms)
    assert (path.parent / plan.plan["recipe"]).is_file()
    for number, (name, arm) in enumerate(plan.arms.items()):
        assert all((path.parent / overlay).is_file() for overlay in arm.overlays)
        assert arm.start is None or names.index(arm.start) < number, name
    assert set(plan.plan["compared"]) <= {name for name, arm in plan.arms.items() if arm.evaluated}
    assert {*plan.plan["baselines"], *plan.plan["intervals"]} <= plan.plan["cells"].keys()
    parser = function_parser(load(COMMANDS["evaluate"][0]), "condenser evaluate")
    known = {option for action in parser._actions for option in action.option_strings}
    for command in plan.plan["cells"].values():
        options = [word for part in command for word in part.split() if word.startswith("--")]
        assert {option.replace("-", "_").replace("__", "--", 1) for option in options} <= known
    nothing = pd.DataFrame(columns=["arm", *study.ABOUT, "metric", "value"], dtype=object)
    assert study.table(nothing, plan.plan["columns"]).startswith("| |")


def test_a_process_that_finds_another_at_the_text_starts_nothing(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "main", None)
    monkeypatch.setattr(sys, "argv", ["study.py", str(written(tmp_path)), *WORDS])
    (tmp_path / "runs/locks").mkdir(parents=True)
    with locked(tmp_path / "runs/locks/store", "{holder}"), pytest.raises(SystemExit, match="not prepared yet"):
        study.study()
    assert "store: at work: process" in capsys.readouterr().out


@pytest.mark.parametrize("path", PLANS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_study_begins_with_the_text_that_its_plan_prepares(path, study, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(study, "main", lambda command: commands.append(command) or 1)
    monkeypatch.setattr(sys, "argv", ["study.py", str(written(tmp_path, path)), *WORDS])
    with pytest.raises(SystemExit):
        study.study()
    assert [main([*command, "--print_config"]) for command in commands] == [0]


@pytest.mark.parametrize(("length", "said"), [(32, "nothing to do"), (16, "made with another max_length; choose")])
def test_a_study_does_not_go_on_over_text_of_other_settings(length, said, study, corpus, tmp_path, monkeypatch, capsys):
    settings = ["--tokenizer", "train:200", "--workers", 1, "--max-length"]
    monkeypatch.setattr(study, "work_on", None)
    for each in (32, length):
        path = written(tmp_path, prepare=[*settings, each], arms={})
        monkeypatch.setattr(sys, "argv", ["study.py", str(path), "--wikipedia", str(corpus), *WORDS[2:]])
        with pytest.raises(SystemExit):
            study.study()
    told = capsys.readouterr()
    assert said in told.out + told.err


def test_a_cell_is_measured_again_of_another_command_or_without_its_result(study, tiny_export, tmp_path, monkeypatch):
    plan = opened(study, written(tmp_path))
    shutil.copytree(tiny_export, tmp_path / "mlm-seed=1" / "export")
    (tmp_path / "pairs.tsv").write_text("score\tsentence1\tsentence2\n1\ta\tb\n2\tc\tc\n3\td\te\n")
    commands = []
    monkeypatch.setattr(study, "main", lambda command: commands.append(command) or main(command))
    for length in (16, 16, 12):
        words = ["--similarity", str(tmp_path / "pairs.tsv"), "--max-length", str(length)]
        study.evaluated(plan, tmp_path / "mlm-seed=1", "sts", words)
    (tmp_path / "mlm-seed=1/evaluation-sts/results.json").unlink()
    study.evaluated(plan, tmp_path / "mlm-seed=1", "sts", words)
    assert [command[-1] for command in commands] == ["16", "12", "12"]


def test_an_arm_is_trained_again_where_its_files_have_changed(study, run, tmp_path, monkeypatch):
    """Which `fit` refuses under the same name."""
    plan, commands = opened(study, written(tmp_path)), []
    monkeypatch.setattr(study, "main", lambda command: commands.append(command[0]) or 0)
    shutil.copytree(run, plan.run_of("mlm", 1))
    for changed in ("", "", "trainer: {max_steps: 7}"):
        with open(tmp_path / "mlm.yaml", "a", encoding="utf-8") as overlay:
            overlay.write(changed)
        assert study.pre_trained(plan, "mlm", 1)
    assert commands == ["fit"] * 2


def test_words_stand_for_folders(study):
    places = {"BEIR": "/data/beir", "STORE": "tokens"}
    words = ["--retrieval", "BEIR/squad", "STORE", "cls"]
    assert [study.replaced(word, places) for word in words] == ["--retrieval", "/data/beir/squad", "tokens", "cls"]


def test_an_arm_differs_from_the_first_in_what_its_name_says_and_nothing_else():
    arms = ("mlm", "no-late-mlm", "early-skip", "frozen-early", "late-skip", "one-head-layer")
    changed = {name: yaml.safe_load((FOLDER / "scratch" / f"{name}.yaml").read_text()) for name in arms}
    assert {name: config.pop("model") for name, config in changed.items()} == {
        "mlm": {"n_head_layers": 0},
        "no-late-mlm": {"late_mlm": False},
        "early-skip": {"skip_from": 1},
        "frozen-early": {"skip_from": 1, "n_head_layers": 1, "freeze_layers": 1},
        "late-skip": {"skip_from": 3},
        "one-head-layer": {"n_head_layers": 1},
    }
    assert all(config == {"name": name} for name, config in changed.items())


@pytest.mark.parametrize("read", ["cls", "zeros", "mean"])
def test_the_gate_s_head_reads_what_it_says(read, study):
    from gate import Gate

    lm = MODELS["bert"](0.0).eval()
    torch.manual_seed(0)
    gate = Gate.from_masked_lm(lm, read=read, skip_from=2, n_head_layers=1).eval()
    plain = Condenser.from_masked_lm(lm, skip_from=2, n_head_layers=1, pruned=False).eval()
    plain.c_head.load_state_dict(gate.c_head.state_dict())
    batch = tiny_batch()
    states = plain(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    plain.cls_hook = {
        "cls": lambda cls: cls,
        "zeros": torch.zeros_like,
        "mean": lambda cls: (states * mask).sum(1) / mask.sum(1),
    }[read]
    torch.testing.assert_close(gate(**batch).head_mlm_loss, plain(**batch).head_mlm_loss)
    torch.testing.assert_close(gate(**batch).mlm_loss, plain(**batch).mlm_loss)
    assert gate.settings["read"] == read


def toy(folder, corpus):
    """All arms of the warm starts, with models and steps of a toy."""
    sizes = {
        "data": {"store": str(folder / "store"), "batch_size": 16, "micro_batches_per_step": 1, "num_workers": 0},
        "model": {"skip_from": 2},
        "checkpoint": {"every_n_steps": 2},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "max_steps": 4, "log_every_n_steps": 2},
    }
    sizes["trainer"] |= {"val_check_interval": 2, "callbacks": None}
    arms = yaml.safe_load((FOLDER / "warm" / "gpu.yaml").read_text())["arms"]
    for arm in arms.values():
        arm["overlays"] = [*arm.get("overlays", ()), "toy.yaml"]
        arm["seeds"] = [1]
        arm["evaluated"] = False
    arms["backbone"]["overlays"].append("toy-backbone.yaml")
    arms["mlm"]["evaluated"] = arms["condenser"]["evaluated"] = True
    prepare = ["--tokenizer", "train:200", "--max-length", "32", "--kind", "spans", "--workers", "1"]
    nothing = {"cells": {}, "intervals": {}, "baselines": [], "reference": None}
    path = written(folder, FOLDER / "warm" / "gpu.yaml", arms=arms, prepare=prepare, **nothing)
    (folder / "toy.yaml").write_text(yaml.safe_dump(sizes))
    backbone = {"model": {"backbone_config": TOY | {"max_position_embeddings": 40}}}
    (folder / "toy-backbone.yaml").write_text(yaml.safe_dump(backbone))
    return path


@pytest.mark.slow
def test_all_arms_of_the_warm_starts_train_from_the_backbone_in_pieces(study, corpus, tmp_path, monkeypatch, capsys):
    path = toy(tmp_path, corpus)
    argv = ["study.py", str(path), "--wikipedia", str(corpus), "--beir", "b", "--sts", "s"]
    monkeypatch.setattr("sys.argv", [*argv, "--arms", "mlm"])
    with pytest.raises(SystemExit, match="no arm is trained yet"):
        study.study()
    assert "mlm-seed=1 waits for backbone-seed=1" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", argv)
    with monkeypatch.context() as during:
        during.setattr(study, "main", lambda command: 75 if command[0] == "fit" else main(command))  # as by SIGTERM
        with pytest.raises(SystemExit, match="75"):
            study.study()
    assert capsys.readouterr().out.count("$ condenser fit") == 1
    study.study()
    plan = opened(study, path)
    said = capsys.readouterr().out
    assert "of 11 runs, 0 runs to go" in said, said[-3000:]
    states = {
        name: torch.load(checkpoints(plan.run_of(name, 1))[0], weights_only=True)["state_dict"] for name in plan.arms
    }
    first = "model.lm.bert.encoder.layer.0.attention.self.query.weight"
    as_it_was = {name for name, state in states.items() if torch.equal(state[first], states["backbone"][first])}
    heads_alone = {"gate-cls", "gate-zeros", "gate-mean", "condenser", "condenser-shallow", "cocondenser", "retromae"}
    assert as_it_was == {"backbone"} | heads_alone  # in the first 4 steps
    for name in heads_alone:
        for key, weight in states["backbone"].items():
            assert torch.equal(states[name][key], weight)
    with locked(plan.runs / "locks" / "mlm-seed=1", "{holder}"):
        study.study()
    assert "mlm-seed=1: at work: process" in capsys.readouterr().out
