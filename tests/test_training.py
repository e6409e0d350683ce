"""Training: exact steps, exact resume, any number of devices, and errors before any work."""

import csv
import json
import os
import re
import runpy
import signal
import subprocess
import time
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_MODEL, data_of, error_of, fit, slow
from lightning.pytorch.callbacks import Callback, Timer
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from condenser.cli import main
from condenser.data.datamodule import CondenserDataModule
from condenser.data.steps import Steps
from condenser.data.store import read_manifest
from condenser.hub import load_checkpoint, load_export
from condenser.models.condenser import Condenser
from condenser.runs import changed_keys, checkpoints
from condenser.training import logs
from condenser.training.checkpoints import WholeFiles
from condenser.training.logs import MetricsCSV
from condenser.training.optim import Optimization, build_optimizer
from condenser.training.step import TrainingStep

METRICS = {
    *(f"train/{name}" for name in ("loss", "mlm_loss", "head_mlm_loss", "mlm_accuracy", "head_mlm_accuracy")),
    *("train/grad_norm", "train/lr", "train/tokens_seen", "train/sequences"),
    *("perf/tokens_per_second", "perf/padding_fraction", "perf/data_wait_fraction", "perf/memory_gb"),
    "perf/checkpoint_seconds",
    *(f"val/{name}" for name in ("loss", "mlm_loss", "head_mlm_loss", "mlm_accuracy", "head_mlm_accuracy")),
    *("val/mlm_loss_at_mask", "val/head_mlm_loss_at_mask", "val/unigram_loss_at_mask"),
}


def metrics_of(
    run, skip=("perf/tokens_per_second", "perf/data_wait_fraction", "perf/memory_gb", "perf/checkpoint_seconds")
):
    with open(run / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in skip} for row in csv.DictReader(file)]


def final_state(run):
    return torch.load(checkpoints(run)[0], weights_only=True)


def assert_same_weights(a, b, **tolerance):
    first, second = final_state(a)["state_dict"], final_state(b)["state_dict"]
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=key)


def assert_minimised(run, **weights):
    """In every row, of training and of validation, the loss is the weighted sum of these terms."""
    for row in metrics_of(run):
        for kind in ("train", "val"):
            if row[f"{kind}/loss"]:
                parts = [weight * float(row[f"{kind}/{term}_loss"]) for term, weight in weights.items()]
                assert float(row[f"{kind}/loss"]) == pytest.approx(sum(parts), rel=1e-5)


def test_a_run_leaves_its_configuration_metrics_checkpoints_and_summary(run):
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.csv", "checkpoints", "summary.json"}
    assert [path.name for path in checkpoints(run)] == ["last-step=8.ckpt", "best-step=8.ckpt", "last-step=6.ckpt"]
    rows = metrics_of(run, skip=())
    assert set(rows[0]) == {"step", "epoch"} | METRICS
    assert [row["step"] for row in rows if row["train/loss"]] == ["1", "3", "5", "7"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["3", "7"]
    assert_minimised(run, mlm=1, head_mlm=1)
    assert all(0 <= float(row["perf/padding_fraction"]) < 0.2 for row in rows if row["train/loss"])
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_two_epochs_see_every_token_twice_and_end_at_a_rate_of_zero(recipe, store, tmp_path):
    epochs = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.val_check_interval", "31"]
    assert fit(recipe, tmp_path, "e", *epochs) == 0
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    train = read_manifest(store)["splits"]["train"]
    assert summary["steps"] == 2 * round(train["rows"] / 32)
    assert summary["tokens_seen"] == 2 * (train["tokens"] + 2 * train["rows"])
    schedule = final_state(tmp_path / "e")["lr_schedulers"][0]
    assert schedule["_last_lr"] == [0.0, 0.0]


def test_the_same_command_on_a_finished_run_says_so(run, recipe, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert fit(recipe, run.parent, run.name) == 0
    assert "is finished (8 steps): nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


class StopAfter(Timer):
    """Ends training after some steps, as a time limit does."""

    def __init__(self, n_steps: int):
        super().__init__(timedelta(days=1))
        self.n_steps = n_steps

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.end = trainer.global_step + self.n_steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left = self.end - trainer.global_step
        trainer.should_stop = trainer.should_stop or self.left <= 0

    def time_remaining(self, stage="train"):
        return self.left


STOP = ["--trainer.callbacks", "test_training.StopAfter", "--trainer.callbacks.n_steps"]


class AskedToStop(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, after: int):
        self.number, self.after = number, after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after:
            os.kill(os.getpid(), self.number)


def asked_to_stop(after, number=signal.SIGTERM):
    asked = ["--trainer.callbacks", "test_training.AskedToStop", "--trainer.callbacks.number", str(int(number))]
    return [*asked, "--trainer.callbacks.after", str(after)]


def test_a_changed_configuration_is_refused_by_name(run, recipe, capsys):
    changes = ["--model.skip_from", "2", "--data.batch_size", "64", "--trainer.devices", "1"]
    assert fit(recipe, run.parent, run.name, *changes) == 1
    assert "started with another data.batch_size, model.skip_from;" in capsys.readouterr().err


def test_only_what_is_computed_counts_as_a_change():
    before = {
        "data": {"batch_size": 1, "num_workers": 1, "tokens_per_pass": 5},
        "trainer": {"devices": 1, "max_steps": 5},
        "wandb": "off",
    }
    after = {"data": {"batch_size": 1, "num_workers": 2}, "trainer": {"devices": 8, "max_steps": 5}, "wandb": "online"}
    assert changed_keys(before, after) == []
    after["trainer"]["precision"], before["trainer"]["precision"] = "32-true", None
    assert changed_keys(before, after) == []
    after["trainer"]["max_steps"] = 6
    assert changed_keys(before, after) == ["trainer.max_steps"]


def loader_of(store, num_workers=0, **settings):
    return data_of(store, num_workers=num_workers, **settings).train_dataloader()


def assert_same_batches(first, second):
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a)


def test_batches_do_not_depend_on_workers_or_on_where_the_loader_began(store):
    alone = loader_of(store)
    two_epochs = [*alone, *alone]
    for num_workers in (1, 4):
        assert_same_batches(two_epochs[: len(alone)], loader_of(store, num_workers=num_workers))
    resumed = loader_of(store, num_workers=2)
    resumed.load_state_dict({"position": len(alone) + 3})
    assert_same_batches(two_epochs[len(alone) + 3 :], resumed)
    assert resumed.state_dict() == {"position": 2 * len(alone)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_get_the_micro_batches_of_one(world_size, store):
    alone = loader_of(store).dataset
    ranks = [
        Steps(alone.mixture, alone.batches, alone.vocabulary, alone.masking, (r, world_size)) for r in range(world_size)
    ]
    for step in (0, 7, alone.batches.steps_per_epoch + 2):
        shared = [batch for batches in zip(*(rank[step] for rank in ranks), strict=True) for batch in batches]
        assert_same_batches([alone[step]], [shared])


def test_masks_are_drawn_anew_each_epoch_and_validation_keeps_its_own(store):
    module = data_of(store)

    def labels(loader):
        found = {}
        for fields in (fields for step in loader for fields in step):
            bounds = fields["cu_seqlens"].tolist()
            masked = np.split(fields["masked_index"].numpy(), np.searchsorted(fields["masked_index"], bounds[1:-1]))
            for sample, first, places in zip(fields["sample_ids"].tolist(), bounds, masked, strict=False):
                found[sample] = (places - first).tolist()
        return found

    training, validation = module.train_dataloader(), module.val_dataloader()
    first, second = labels(training), labels(training)
    assert first.keys() == second.keys() == set(range(len(module.train)))
    assert np.mean([first[sample] != second[sample] for sample in first]) > 0.8
    assert labels(validation) == labels(validation)
    assert labels(validation).keys() == set(range(len(module.validation)))


def test_a_pass_is_what_the_design_says(store):
    loader = loader_of(store)
    vocabulary = loader.dataset.vocabulary
    step = next(iter(loader))
    fields = [*step][1]
    ids, bounds, masked = fields["input_ids"], fields["cu_seqlens"], fields["masked_index"]
    lengths = bounds.diff()
    assert (ids[bounds[:-1]] == vocabulary.cls_id).all()
    assert (ids[bounds[1:] - 1] == vocabulary.sep_id).all()
    assert (ids.bincount(minlength=5)[[2, 3]] == len(lengths)).all()
    assert torch.equal(fields["position_ids"], torch.cat([torch.arange(n) for n in lengths]))
    whole = ids.index_copy(0, masked, fields["labels"])
    assert not torch.isin(fields["labels"], torch.tensor([0, 2, 3])).any()
    rows = loader.dataset.mixture.samples(0, loader.dataset.batches.step(0)[1]).rows
    inner = torch.ones(len(ids), dtype=torch.bool).index_fill(0, torch.cat([bounds[:-1], bounds[1:] - 1]), False)
    assert whole[inner].tolist() == loader.dataset.mixture.read(rows).tokens.tolist()
    assert (fields["n_masked"], fields["n_tokens"], fields["n_sequences"]) == (len(masked), len(ids), len(lengths))
    assert (fields["epoch"], fields["step"], fields["micro_batch"]) == (0, 0, 1)
    query, begins = fields["query_index"], fields["cu_seqlens_query"]
    assert torch.equal(query[begins[:-1]], bounds[:-1])
    assert torch.equal(query[fields["masked_slot"]], masked)
    assert sorted(query.tolist()) == sorted([*masked.tolist(), *bounds[:-1].tolist()])
    assert (fields["max_seqlen"], fields["max_query"]) == (lengths.max(), begins.diff().max())
    assert step.buffer.numel() == sum(value.numel() for f in step for value in f.values() if torch.is_tensor(value))


def tiny_condenser():
    torch.manual_seed(0)
    return Condenser.from_masked_lm(BertForMaskedLM(BertConfig(vocab_size=50, **TINY_MODEL)), skip_from=1)


def test_no_decay_on_biases_and_layer_norm():
    model = tiny_condenser()
    optimizer = build_optimizer(nn.ModuleDict({"model": model}), Optimization(learning_rate=2.0))
    decayed, plain = (set(map(id, group["params"])) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        assert (id(parameter) in plain) == ("bias" in name or "LayerNorm" in name), name
        assert (id(parameter) in plain) != (id(parameter) in decayed)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_the_gradient_is_clipped_to_its_setting(recipe, tmp_path):
    """With a clip far below the norm, AdamW still moves; the norm that is logged is the one before clipping."""
    for name, clip in (("free", "0"), ("clipped", "1e-3")):
        assert fit(recipe, tmp_path, name, "--model.optimizer.gradient_clip", clip, "--trainer.max_steps", "2") == 0
    norms = [float(metrics_of(tmp_path / name)[0]["train/grad_norm"]) for name in ("free", "clipped")]
    assert min(norms) > 0.1
    states = [final_state(tmp_path / name)["optimizer_states"][0]["state"] for name in ("free", "clipped")]
    assert states[1][0]["exp_avg"].norm() < 0.01 * states[0][0]["exp_avg"].norm()


VARIANTS = {
    "bf16": ["--trainer.precision", "bf16-mixed"],
    "plain MLM": ["--model.n_head_layers", "0"],
    "head alone, whole layers": ["--model.late_mlm", "false", "--model.pruned", "false"],
    "token masking": ["--data.mask_unit", "token", "--data.mask_probability", "0.3"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train(variant, recipe, tmp_path):
    assert fit(recipe, tmp_path, "v", *VARIANTS[variant]) == 0
    losses = [float(row["val/loss"]) for row in metrics_of(tmp_path / "v") if row["val/loss"]]
    assert losses[-1] < losses[0]
    streams = {"plain MLM": {"mlm"}, "head alone, whole layers": {"head_mlm"}}.get(variant, {"mlm", "head_mlm"})
    assert {f"val/{stream}_loss" for stream in streams} == set(metrics_of(tmp_path / "v")[0]) & {
        "val/mlm_loss",
        "val/head_mlm_loss",
    }
    if variant == "plain MLM":
        assert main(["export", str(tmp_path / "v"), "--output", str(tmp_path / "export")]) == 0
        assert len(load_export(tmp_path / "export").c_head) == 0


def test_validate_gives_the_runs_last_validation(run, recipe, capsys):
    assert main(["validate", "--config", str(recipe), "--runs_dir", str(run.parent), "--name", run.name]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"val/loss +│ +([0-9.]+)", printed)
    assert float(found[1]) == pytest.approx(float(metrics_of(run)[-1]["val/loss"]), rel=1e-6)


def test_validate_says_where_there_is_nothing_to_validate_on(run, recipe, store, corpus, tmp_path, capsys):
    made = ["--input", str(corpus), "--tokenizer", str(store / "tokenizer"), "--output", str(tmp_path / "out")]
    assert main(["prepare", *made, "--validation-fraction", "0", "--max-length", "40"]) == 0
    where = ["--runs_dir", str(run.parent), "--name", run.name, "--data.store", str(tmp_path / "out")]
    error_of(capsys, main(["validate", "--config", str(recipe), *where]), "larger --validation-fraction")


def test_validation_is_the_global_mean_over_masked_tokens(run, store):
    model, _ = load_checkpoint(checkpoints(run)[0])
    module = data_of(store, batch_size=7, micro_batches_per_step=1, seed=1)
    losses, at_mask, nats = [], [], []
    with torch.no_grad():
        for fields in (fields for step in module.val_dataloader() for fields in step):
            losses.append(model.losses(fields, score=True)["mlm"].losses)
            at_mask.append(fields["input_ids"][fields["masked_index"]] == 4)
            nats.append(module.unigram_nats[fields["labels"]])
    losses, at_mask, nats = map(torch.cat, (losses, at_mask, nats))
    last = metrics_of(run)[-1]
    assert float(last["val/mlm_loss"]) == pytest.approx(losses.mean().item(), rel=1e-4)
    assert float(last["val/mlm_loss_at_mask"]) == pytest.approx(losses[at_mask].mean().item(), rel=1e-4)
    assert float(last["val/unigram_loss_at_mask"]) == pytest.approx(nats[at_mask].mean().item(), rel=1e-4)


@pytest.mark.parametrize("tail", ["6,0,cu", "\0" * 50])  # cut short; never written where the power failed
def test_a_resumed_csv_drops_what_was_logged_after_the_checkpoint(tail, tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.begin_at(0)
    for step in range(6):
        logger.log_metrics({"a": step, "epoch": 0}, step)
    logger.log_metrics({"b": 1.0, "epoch": 0}, 5)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(tail)
    again = MetricsCSV(tmp_path)
    again.begin_at(4)
    again.log_metrics({"a": 40, "epoch": 1}, 4)
    expected = [("0", "0.0"), ("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "40.0")]
    assert [(row["step"], row["a"]) for row in metrics_of(tmp_path)] == expected


def test_a_broken_line_of_a_csv_is_named(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0\nhello,0\n2,0\n")
    with pytest.raises(ValueError, match=r"metrics.csv, line 3: begins with b'hello', which is no step"):
        MetricsCSV(tmp_path).begin_at(4)
    assert (tmp_path / "metrics.csv").read_text().endswith("2,0\n")


@pytest.mark.parametrize("content", [b"time,loss\n1,2\n", b"\xff\xfe\n"])
def test_a_csv_of_something_else_is_refused_before_training_and_left_as_it_is(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics.csv has no 'step' column"):
        MetricsCSV(tmp_path).begin_at(0)
    assert (tmp_path / "metrics.csv").read_bytes() == content


def test_what_is_installed_does_not_claim_the_commit_of_a_repository_around_it(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(logs, "__file__", str(tmp_path / "condenser/training/logs.py"))
    assert re.fullmatch("[0-9a-f]{40}", logs.commit())
    monkeypatch.setattr(logs, "__file__", str(tmp_path / "site-packages/condenser/training/logs.py"))
    assert logs.commit() == "unknown"


def test_a_checkpoint_of_another_model_or_of_none_is_refused(run, recipe, tmp_path, capsys):
    checkpoint = ["--ckpt_path", str(checkpoints(run)[0])]
    assert fit(recipe, tmp_path, "r", *checkpoint, "--model.backbone_config.intermediate_size", "96") == 1
    assert "is of another model: model." in capsys.readouterr().err
    error_of(capsys, fit(recipe, tmp_path, "r", "--ckpt_path", str(recipe)), "is missing, damaged, or no checkpoint")


def test_micro_batches_that_the_devices_cannot_share_are_refused(store):
    module = CondenserDataModule(str(store), batch_size=16, micro_batches_per_step=4)
    module.trainer = SimpleNamespace(world_size=3, global_rank=0)
    with pytest.raises(ValueError, match="micro_batches_per_step=4 cannot be shared out evenly over 3 devices"):
        module.setup("fit")


def test_and_where_it_is_told_how_many_there_are_before_they_are_started(recipe, tmp_path, capsys, monkeypatch):
    launcher = "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher"
    monkeypatch.setattr(f"{launcher}._call_children_scripts", lambda self: pytest.fail("they were started"))
    code = fit(recipe, tmp_path, "three", "--trainer.devices", "3")
    error_of(capsys, code, "over 3 devices; make it a multiple of 3")


def test_what_print_config_prints_can_be_given_back_also_with_callbacks_and_without_quotes(recipe, capsys, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    callback = "{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 1e-3}}"
    overlay.write_text(f"wandb: off\ntrainer:\n  callbacks: [{callback}]\n")  # off is false in YAML
    words = ["fit", "--config", str(recipe), "-c", str(overlay), "--print_config"]
    assert main(words) == 0
    overlay.write_text(printed := capsys.readouterr().out)
    assert "device: cpu" in printed
    assert yaml.safe_load(printed)["data"]["batch_size"] == 32
    assert yaml.safe_load(printed)["model"]["init_args"]["n_head_layers"] == 2
    assert main(words) == 0
    assert capsys.readouterr().out == printed


CONFIGS = Path(__file__).parents[1] / "configs"
STUDY = "study/scratch/study.yaml"
RECIPES = ["condenser.yaml", "cocondenser.yaml", "retromae.yaml", "demo.yaml", "small.yaml", STUDY]
OTHERWISE = [*CONFIGS.glob("study/warm/*.yaml"), *CONFIGS.glob("study/*/plan.yaml")]  # see test_study.py
SHIPPED = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path not in OTHERWISE)


def base_of(name):
    """The recipe that an overlay is laid over."""
    said = re.search(r"# For configs/(\w+.yaml)", (CONFIGS / name).read_text())
    return said[1] if said else STUDY if name.startswith("study/") else "condenser.yaml"


OVERLAYS = [[base_of(name), name] for name in SHIPPED if name not in RECIPES]


CONFIGURATIONS = [[name] for name in RECIPES] + [slow(names) for names in OVERLAYS]


@pytest.mark.parametrize("names", CONFIGURATIONS, ids=lambda names: "+".join(names))
def test_every_shipped_configuration_trains(names, store, spans, tiny_export, tmp_path):
    store = spans if names[0] in ("cocondenser.yaml", "demo.yaml") else store
    small = {"data.store": store, "data.batch_size": 8, "data.num_workers": 0, "model.skip_from": 1, "wandb": "off"}
    small |= {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.num_nodes": 1}
    small |= {"trainer.max_epochs": -1, "trainer.max_steps": 2}
    small |= {"trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": "false"}
    if names[0] in ("condenser.yaml", "cocondenser.yaml", "retromae.yaml"):
        small |= {"model.backbone": tiny_export}
    else:
        sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
        small |= {f"model.backbone_config.{name}": value for name, value in sizes.items()}
        small |= {"data.micro_batches_per_step": 2}
    files = [part for name in names for part in ("-c", str(CONFIGS / name))]
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    assert main(["fit", *files, *options, "--runs_dir", str(tmp_path), "--name", "smoke"]) == 0
    assert (tmp_path / "smoke" / "summary.json").is_file()


@pytest.mark.parametrize(
    ("number", "num_workers"),
    [
        (signal.SIGTERM, "2"),
        (signal.SIGUSR1, "0"),
        (signal.SIGINT, "2"),
        slow(signal.SIGTERM, "0"),
        slow(signal.SIGUSR1, "2"),
        slow(signal.SIGINT, "0"),
    ],
)
def test_a_run_that_a_signal_stops_saves_says_so_and_goes_on_without_losing_a_step(
    number, num_workers, recipe, run, tmp_path, capsys
):
    options = ["--data.num_workers", num_workers, "--checkpoint.every_n_steps", "100"]
    before = signal.getsignal(number)
    assert fit(recipe, tmp_path, "asked", *options, *asked_to_stop(3, number)) == (
        130 if number == signal.SIGINT else 75
    )
    assert signal.getsignal(number) == before
    assert "was asked to stop, and did after step 5; start it again" in capsys.readouterr().out
    assert checkpoints(tmp_path / "asked")[0].name == "last-step=5.ckpt"
    assert not (tmp_path / "asked" / "summary.json").exists()
    assert fit(recipe, tmp_path, "asked", "--data.num_workers", num_workers) == 0
    assert_same_weights(tmp_path / "asked", run)


def perf_of(run, name):
    return [float(row[f"perf/{name}"]) for row in metrics_of(run, skip=()) if row[f"perf/{name}"]]


def test_a_device_that_is_late_is_in_the_speed_and_is_not_waiting_for_data(recipe, tmp_path, monkeypatch):
    """The host runs ahead of it and waits where something is fetched: a stub takes 0.3 s there, at logging steps."""
    tolist = torch.Tensor.tolist

    def late(tensor):
        if tensor.dtype == torch.float64 and len(tensor) > 10:  # what is logged
            time.sleep(0.3)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", late)
    options = ["--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "100", "--trainer.max_steps", "5"]
    assert fit(recipe, tmp_path, "late", *options) == 0
    rows = [row for row in metrics_of(tmp_path / "late") if row["train/loss"]]
    tokens = np.diff([0.0, *(float(row["train/tokens_seen"]) for row in rows)])
    seconds = tokens[1:] / perf_of(tmp_path / "late", "tokens_per_second")[1:]
    assert (seconds > 0.3).all()
    assert np.median(perf_of(tmp_path / "late", "data_wait_fraction")) < 0.2


def test_waiting_for_data_is_the_wait_for_the_loader_and_not_for_a_checkpoint(recipe, tmp_path, monkeypatch):
    options = ["--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "100", "--trainer.max_steps", "4"]
    save, one_pass = WholeFiles.save_checkpoint, Steps.one_pass

    def slow(function):
        return lambda *args, **kwargs: time.sleep(0.2) or function(*args, **kwargs)

    monkeypatch.setattr(WholeFiles, "save_checkpoint", slow(save))
    assert fit(recipe, tmp_path, "disk", *options, "--checkpoint.every_n_steps", "1") == 0
    assert np.median(perf_of(tmp_path / "disk", "data_wait_fraction")) < 0.5
    monkeypatch.setattr(WholeFiles, "save_checkpoint", save)
    monkeypatch.setattr(Steps, "one_pass", slow(one_pass))
    assert fit(recipe, tmp_path, "data", *options) == 0
    assert np.median(perf_of(tmp_path / "data", "data_wait_fraction")) > 0.5


def test_speed_is_of_the_steps_since_the_validation_before(recipe, tmp_path, monkeypatch):
    """Steps take 0.05 s by a clock that counts nothing else; there are validations between the logging steps."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    take = TrainingStep.take

    def timed(*args, **kwargs):
        clock.now += 0.05
        return take(*args, **kwargs)

    monkeypatch.setattr(TrainingStep, "take", timed)
    options = ["--trainer.log_every_n_steps", "4", "--trainer.val_check_interval", "3", "--trainer.max_steps", "12"]
    assert fit(recipe, tmp_path, "r", *options) == 0
    tokens = float([row for row in metrics_of(tmp_path / "r") if row["train/loss"]][-1]["train/tokens_seen"])
    for speed in perf_of(tmp_path / "r", "tokens_per_second"):
        assert speed == pytest.approx(tokens / 12 / 0.05, rel=0.3)


def test_waiting_for_data_is_counted_on_where_loaders_are_made_anew(recipe, tmp_path):
    every = ["--trainer.reload_dataloaders_every_n_epochs", "1", "--trainer.limit_train_batches", "2"]
    assert fit(recipe, tmp_path, "r", *every, "--trainer.log_every_n_steps", "1") == 0
    assert min(perf_of(tmp_path / "r", "data_wait_fraction")) >= 0


def test_a_run_of_a_checkout_that_is_not_installed_ends_well(recipe, tmp_path, monkeypatch):
    """Without package metadata, as on a machine where the code is just on the path."""
    version = metadata.version

    def missing(name):
        if name == "condenser":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert fit(recipe, tmp_path, "r", "--trainer.max_steps", "1") == 0
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["versions"]["condenser"] == "not installed"


@pytest.mark.slow
def test_the_gpu_script_does_all_its_parts_at_toy_size(tmp_path, monkeypatch):
    """So that the first GPU is not its first test; where there is none, replays are left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    script = runpy.run_path(str(Path(__file__).parent / "gpu.py"))
    assert script["main"](["--toy", "--json", "gpu.json"]) == 0, Path("gpu.json").read_text()
    found = json.loads(Path("gpu.json").read_text())
    assert {"equality", "replay", "run"} < found.keys()
    assert len([name for name in found if name.startswith("bench: ")]) == 3
