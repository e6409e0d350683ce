"""When a run ends, what it goes on from and over, and what its flags do."""

import errno
import json
import math
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from conftest import TINY_MODEL, data_of, error_of, fit, make_documents, slow, write_jsonl
from lightning.pytorch.callbacks import Callback
from test_devices import DDP, SHARDED, start_ranks, wait_for, write_recipe
from test_training import STOP, asked_to_stop, assert_same_weights, final_state, metrics_of, tiny_condenser

from condenser.cli import main
from condenser.data.datamodule import CondenserDataModule
from condenser.data.lock import locked
from condenser.data.mixing import Mixture
from condenser.data.store import TokenStore
from condenser.models.cocondenser import CoCondenser
from condenser.models.retromae import RetroMAE
from condenser.runs import checkpoints, step_of
from condenser.training.module import CondenserModule
from condenser.training.optim import Optimization, build_optimizer

WIDE = ["--data.batch_size", "248"]  # 4 steps an epoch
EPOCHS = ["--trainer.max_steps", "-1", "--trainer.max_epochs"]
SHAPE = ["--max-length", "32", "--validation-fraction", "0.1", "--workers", "1"]


def summary(run):
    return json.loads((run / "summary.json").read_text())


def rates(run):
    return [float(row["train/lr"]) for row in metrics_of(run) if row["train/lr"]]


class Reads(Callback):
    """Keeps which samples each step read, and its rate, for all runs of this process."""

    seen: list = []  # noqa: RUF012

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        ids = sorted(int(i) for fields in batch for i in fields["sample_ids"])
        Reads.seen.append((trainer.global_step, ids, trainer.optimizers[0].param_groups[0]["lr"]))


READS = ["--trainer.callbacks+", f"{__name__}.Reads"]


@pytest.fixture
def seen():
    Reads.seen.clear()
    return Reads.seen


# --- its length


@pytest.mark.parametrize(("limit", "per_epoch"), [("3", 3), ("0.5", 2), slow("1.0", 4), slow("100", 4)])
def test_an_epoch_has_the_steps_that_it_is_limited_to_for_the_schedule_and_for_the_end(
    limit, per_epoch, recipe, tmp_path, capsys, seen
):
    every = ["--trainer.log_every_n_steps", "1"]
    options = [*WIDE, *EPOCHS, "2", "--trainer.limit_train_batches", limit, *every]
    assert fit(recipe, tmp_path, "limited", *options, *READS) == 0
    assert summary(tmp_path / "limited")["steps"] == 2 * per_epoch
    assert [step for step, _, _ in seen] == list(range(2 * per_epoch))
    assert fit(recipe, tmp_path, "n", *WIDE, "--trainer.max_steps", str(2 * per_epoch), *every) == 0
    assert rates(tmp_path / "limited") == rates(tmp_path / "n")
    assert len(set(map(str, (ids for _, ids, _ in seen)))) == 2 * per_epoch
    capsys.readouterr()
    assert fit(recipe, tmp_path, "limited", *options, *READS) == 0
    assert f"is finished ({2 * per_epoch} steps): nothing to do" in capsys.readouterr().out


def test_overfitting_repeats_the_same_steps(recipe, tmp_path, seen):
    options = [*WIDE, *EPOCHS, "3", "--trainer.overfit_batches", "2", "--trainer.log_every_n_steps", "1"]
    assert fit(recipe, tmp_path, "over", *options, *READS) == 0
    assert summary(tmp_path / "over")["steps"] == 6
    ids = [ids for _, ids, _ in seen]
    assert ids[:2] == ids[2:4] == ids[4:]
    assert ids[0] != ids[1]


@pytest.mark.slow
def test_loaders_that_are_made_anew_each_epoch_change_nothing(recipe, tmp_path, seen):
    options = [*WIDE, *EPOCHS, "3"]
    assert fit(recipe, tmp_path, "plain", *options, *READS) == 0
    plain = list(seen)
    seen.clear()
    anew = [*options, "--trainer.reload_dataloaders_every_n_epochs", "1"]
    assert fit(recipe, tmp_path, "anew", *anew, *READS) == 0
    assert seen == plain
    seen.clear()
    for n_steps in ("2", "3", "1"):
        assert fit(recipe, tmp_path, "parts", *anew, *STOP, n_steps) == 0
    assert fit(recipe, tmp_path, "parts", *anew) == 0
    assert_same_weights(tmp_path / "parts", tmp_path / "plain")


# --- finished, or stopped


EARLY = ["--trainer.callbacks+", "lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
EARLY += ["--trainer.callbacks.divergence_threshold", "0.1"]  # at the first validation


@pytest.mark.parametrize(
    "every", [[], ["--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1"]]
)
def test_a_run_that_a_callback_ends_is_finished(every, recipe, tmp_path, capsys):
    options = [*WIDE, *EARLY, *every, "--trainer.num_sanity_val_steps", "0"]
    assert fit(recipe, tmp_path, "early", *options) == 0
    assert "is finished: 4 steps, of 8: a callback ended it" in capsys.readouterr().out
    assert summary(tmp_path / "early")["steps"] == 4
    assert fit(recipe, tmp_path, "early", *options) == 0
    assert "is finished (4 steps): nothing to do" in capsys.readouterr().out


def test_early_stopping_waits_for_the_least_number_of_steps_and_a_signal_does_not(recipe, tmp_path):
    options = [*WIDE, *EARLY, "--trainer.min_steps", "6", "--trainer.num_sanity_val_steps", "0"]
    assert fit(recipe, tmp_path, "early", *options) == 0
    assert summary(tmp_path / "early")["steps"] >= 6
    assert fit(recipe, tmp_path, "asked", *asked_to_stop(1), "--trainer.min_steps", "8") == 75
    assert step_of(checkpoints(tmp_path / "asked")[0]) < 5


def test_a_run_without_time_is_stopped_and_goes_on(recipe, run, tmp_path, capsys):
    assert fit(recipe, tmp_path, "late", "--trainer.max_time", "00:00:00:00") == 0
    assert (
        "stopped by trainer.max_time after step 0; start it again with more of it to go on" in capsys.readouterr().out
    )
    assert not (tmp_path / "late/summary.json").exists()
    assert fit(recipe, tmp_path, "late", *STOP, "3") == 0
    assert "was stopped by trainer.max_time after step 3; start it again" in capsys.readouterr().out
    assert fit(recipe, tmp_path, "late") == 0
    assert "is finished: 8 steps" in capsys.readouterr().out
    assert_same_weights(tmp_path / "late", run)
    assert metrics_of(tmp_path / "late") == metrics_of(run)


def test_fast_dev_run_leaves_nothing(recipe, run, tmp_path, capsys):
    assert fit(recipe, tmp_path, "fast", "--trainer.fast_dev_run", "2") == 0
    assert "fast_dev_run: 2 step(s) and a validation went through; nothing is kept" in capsys.readouterr().out
    assert not (tmp_path / "fast").exists()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert fit(recipe, run.parent, run.name, "--trainer.fast_dev_run", "true") == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# --- made longer


@pytest.mark.parametrize(
    ("first", "then", "steps"),
    [
        (["--trainer.max_steps", "4"], [*EPOCHS, "2"], 8),
        ([*EPOCHS, "1"], ["--trainer.max_steps", "7", "--trainer.max_epochs", "-1"], 7),
        slow(["--trainer.max_steps", "6"], [*EPOCHS, "2"], 8),
        slow(["--trainer.max_steps", "6"], ["--trainer.max_steps", "10"], 10),
        slow([*EPOCHS, "1"], [*EPOCHS, "3"], 12),
        slow(["--trainer.max_steps", "6"], ["--trainer.max_steps", "10", "--trainer.max_epochs", "2"], 8),
    ],
)
def test_a_run_is_made_longer_and_trains_what_is_missing(first, then, steps, recipe, tmp_path, seen):
    same = [*WIDE, "--checkpoint.keep_last", "5", "--trainer.log_every_n_steps", "1"]
    assert fit(recipe, tmp_path, "run", *same, *first, *READS) == 0
    n = summary(tmp_path / "run")["steps"]
    (third,) = (path for path in checkpoints(tmp_path / "run") if step_of(path) == 3)
    seen.clear()
    assert fit(recipe, tmp_path, "whole", *same, *then, *READS) == 0
    whole = list(seen)
    assert [step for step, _, _ in whole] == list(range(steps))
    seen.clear()
    assert fit(recipe, tmp_path, "other", *same, *then, *READS, "--ckpt_path", str(third)) == 0  # as another run
    assert seen == whole[3:]  # the same samples, at the rates of the new length from the first step on
    assert summary(tmp_path / "other")["steps"] == steps
    seen.clear()
    assert fit(recipe, tmp_path, "run", *same, *then, *READS) == 0  # and the run itself
    assert seen == whole[n:]
    assert summary(tmp_path / "run")["steps"] == steps
    assert [int(row["step"]) for row in metrics_of(tmp_path / "run") if row["train/loss"]] == list(range(steps))


def test_a_run_is_not_made_shorter_than_it_is(run, recipe, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert fit(recipe, run.parent, run.name, "--trainer.max_steps", "5") == 1
    assert "has taken 8 steps, more than trainer.max_steps allows (5)" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_is_shortened_to_where_it_stands_is_validated_there(recipe, tmp_path):
    assert fit(recipe, tmp_path, "r", *STOP, "3") == 0
    (tmp_path / "r/summary.json").write_text("{}")  # of which nothing follows
    assert fit(recipe, tmp_path, "r", "--trainer.max_steps", "3") == 0
    assert [row["step"] for row in metrics_of(tmp_path / "r") if row.get("val/loss")] == ["2"]
    assert summary(tmp_path / "r")["steps"] == 3
    assert (tmp_path / "r/checkpoints/best-step=3.ckpt").is_file()


def test_nothing_to_validate_on_is_said(recipe, run, capsys):
    where = ["--runs_dir", str(run.parent), "--name", run.name, "--trainer.limit_val_batches", "0"]
    assert main(["validate", "--config", str(recipe), *where]) == 1
    assert "trainer.limit_val_batches=0 leaves nothing to validate on" in capsys.readouterr().err


def test_what_only_looks_on_may_change_between_starts(recipe, run, tmp_path):
    assert fit(recipe, tmp_path, "r", *STOP, "3") == 0
    looks = ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    looks += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_model_summary=true"]
    assert fit(recipe, tmp_path, "r", *looks) == 0
    assert_same_weights(tmp_path / "r", run)


# --- the last step


def test_validation_runs_at_the_last_step_and_an_export_is_of_it(recipe, tmp_path, capsys):
    options = ["--trainer.max_steps", "7", "--checkpoint.keep_last", "9"]
    assert fit(recipe, tmp_path, "r", *options) == 0
    assert [row["step"] for row in metrics_of(tmp_path / "r") if row["val/loss"]] == ["3", "6"]
    best = min((float(row["val/loss"]), int(row["step"]) + 1) for row in metrics_of(tmp_path / "r") if row["val/loss"])
    assert (tmp_path / f"r/checkpoints/best-step={best[1]}.ckpt").is_file()
    exported = {}
    for name, choice in {"last": [], "best": ["--best"], "three": ["--step", "3"]}.items():
        assert main(["export", str(tmp_path / "r"), "--output", str(tmp_path / name), *choice]) == 0
        exported[name] = json.loads((tmp_path / name / "condenser.json").read_text())["source"]["step"]
    assert exported == {"last": 7, "best": best[1], "three": 3}
    capsys.readouterr()
    assert main(["export", str(tmp_path / "r"), "--output", str(tmp_path / "no"), "--step", "5"]) == 1
    assert "no checkpoint of step 5, but last-step=7.ckpt" in capsys.readouterr().err
    file = str(checkpoints(tmp_path / "r")[0])
    assert main(["export", file, "--output", str(tmp_path / "no"), "--best"]) == 1
    assert main(["export", str(tmp_path / "r"), "--output", str(tmp_path / "no"), "--best", "--step", "7"]) == 1
    assert not (tmp_path / "no").exists()


def test_a_worse_end_is_not_the_best_and_is_exported_all_the_same(recipe, tmp_path):
    options = ["--model.optimizer.learning_rate", "1", "--model.optimizer.warmup_fraction", "1"]  # larger every step
    assert fit(recipe, tmp_path, "r", *options, "--trainer.val_check_interval", "1", "--trainer.max_steps", "3") == 0
    losses = {int(row["step"]) + 1: float(row["val/loss"]) for row in metrics_of(tmp_path / "r") if row["val/loss"]}
    assert min(losses, key=losses.get) < 3, losses
    assert main(["export", str(tmp_path / "r"), "--output", str(tmp_path / "e")]) == 0
    assert json.loads((tmp_path / "e" / "condenser.json").read_text())["source"]["step"] == 3


# --- its data


@pytest.mark.parametrize("change", ["appended", "exchanged", slow("anew")])
def test_a_run_does_not_go_on_over_other_data(change, recipe, tmp_path, capsys):
    def prepare(store, texts, *options):
        path = write_jsonl(tmp_path / f"{store}-{len(texts)}.jsonl", texts)
        assert main(["prepare", "--input", str(path), *SHAPE, "--output", str(tmp_path / store), *options]) == 0

    data, texts = tmp_path / "data", make_documents(200)
    prepare("data", texts, "--tokenizer", "train:200")
    options = ["--data.store", str(data)]
    assert fit(recipe, tmp_path, "r", *options, *STOP, "3") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    tokenizer = ["--tokenizer", str(shutil.copytree(data / "tokenizer", tmp_path / "tokenizer"))]
    if change == "appended":
        prepare("data", texts[:40], "--tokenizer", "train:200", "--append")
    if change == "anew":
        shutil.rmtree(data)
        prepare("data", texts[:100], *tokenizer)
    if change == "exchanged":
        prepare("other", texts[::-1], *tokenizer)
        shutil.rmtree(data)
        (tmp_path / "other").rename(data)
    capsys.readouterr()
    error = error_of(capsys, fit(recipe, tmp_path, "r", *options))
    assert f"{data} is not the store that {checkpoints(tmp_path / 'r')[0]} was trained on" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")} == before
    assert fit(recipe, tmp_path, "other", *options, "--ckpt_path", str(checkpoints(tmp_path / "r")[0])) == 1
    assert not (tmp_path / "other").exists()


def test_a_store_that_was_made_again_from_the_same_text_is_the_same(recipe, store, corpus, run, tmp_path):
    for folder in ("a", "b"):
        options = [*SHAPE, "--tokenizer", "train:200", "--output", str(tmp_path / "data")]
        assert main(["prepare", "--input", str(corpus), *options]) == 0
        if folder == "a":
            assert fit(recipe, tmp_path, "r", "--data.store", str(tmp_path / "data"), *STOP, "3") == 0
            shutil.rmtree(tmp_path / "data")
    assert fit(recipe, tmp_path, "r", "--data.store", str(tmp_path / "data")) == 0
    assert_same_weights(tmp_path / "r", run)


# --- one process


class Waits(Callback):
    """Goes on when a file is there."""

    def __init__(self, file: str):
        self.file = Path(file)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self.file.with_suffix(".began").touch()
            while not self.file.exists():
                time.sleep(0.02)


def wait_until(path):
    deadline = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_start_is_refused_while_the_first_lives_and_takes_over_when_it_was_killed(
    recipe, run, tmp_path, capsys
):
    waits = {"class_path": "test_ending.Waits", "init_args": {"file": str(tmp_path / "go.on")}}
    path = write_recipe(recipe, tmp_path / "waits.yaml", trainer__callbacks=[waits], data__num_workers=2)
    arguments = ["--config", str(path), "--runs_dir", str(tmp_path), "--name", "r"]
    (first,) = start_ranks(1, [arguments], tmp_path / "log")
    try:
        wait_until(tmp_path / "go.began")
        began = time.monotonic()
        assert f"r is being trained by process {first.pid} on" in error_of(capsys, fit(recipe, tmp_path, "r"))
        assert time.monotonic() - began < 5
    finally:
        first.kill()
        first.join()
    assert fit(recipe, tmp_path, "r") == 0  # at once, also while loader workers are still about
    assert f"was left by process {first.pid} on" in capsys.readouterr().out
    assert not (tmp_path / "r" / "lock").exists()
    assert_same_weights(tmp_path / "r", run)


def test_a_lock_goes_with_its_holder_and_not_with_a_file(tmp_path):
    with locked(tmp_path / "lock", "{me} is busy with {holder}"):
        busy = pytest.raises(ValueError, match=r"\{me} is busy with process")
        with busy, locked(tmp_path / "lock", "{me} is busy with {holder}"):
            pass
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on")
    (tmp_path / "lock").write_text("process 1 on elsewhere")
    with locked(tmp_path / "lock", "busy with {holder}"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
    with locked(tmp_path / "lock", "busy with {holder}"):
        assert child.is_alive()
    child.kill()
    child.join()


def test_a_lock_holds_on_a_full_disk_and_leaves_nothing_there(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path / "lock", "busy with {holder}"):
        busy = pytest.raises(ValueError, match="busy with another process")
        with busy, locked(tmp_path / "lock", "busy with {holder}"):
            pass
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("name", ["../out", "..", ".", "/tmp/out", "a/../../out", "./"])
def test_a_name_stays_inside_the_folder_of_runs(name, recipe, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert f"--name {name}: it must name a folder inside" in error_of(capsys, fit(recipe, runs, name))
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_made_inside_another(run, recipe, capsys):
    for name in (f"{run.name}/b", f"{run.name}/checkpoints"):
        assert f"--name {name}: {run} is a run itself" in error_of(capsys, fit(recipe, run.parent, name))


def test_a_run_does_not_begin_beyond_its_end(run, recipe, tmp_path, capsys):
    assert fit(recipe, tmp_path, "r", "--trainer.max_steps", "4", "--ckpt_path", str(checkpoints(run)[0])) == 1
    assert "has taken 8 steps, and the run is to have 4" in capsys.readouterr().err
    assert not (tmp_path / "r" / "summary.json").exists()


def test_names_may_have_folders(recipe, tmp_path):
    assert fit(recipe, tmp_path, "study/one", "--trainer.max_steps", "1") == 0
    assert (tmp_path / "study/one/summary.json").is_file()


# --- the user's Lightning


CALLBACKS = "lightning.pytorch.callbacks."
GUESTS = [
    {"class_path": f"{CALLBACKS}ModelCheckpoint", "init_args": {"monitor": "val/loss", "save_top_k": 2}},
    {"class_path": f"{CALLBACKS}LearningRateMonitor"},
    {"class_path": f"{CALLBACKS}EarlyStopping", "init_args": {"monitor": "val/loss"}},
    {"class_path": f"{CALLBACKS}Timer", "init_args": {"duration": "00:01:00:00"}},
    {"class_path": f"{CALLBACKS}DeviceStatsMonitor"},
]


@pytest.mark.parametrize("guests", [GUESTS, {"class_path": f"{CALLBACKS}EMAWeightAveraging"}], ids=["list", "one"])
def test_lightnings_own_callbacks_work_as_one_or_in_a_list_and_so_does_a_profiler(guests, recipe, tmp_path):
    changes = {"trainer__callbacks": guests, "trainer__max_steps": -1, "trainer__max_epochs": 2}
    file = write_recipe(recipe, tmp_path / "guests.yaml", **changes, data__batch_size=248)
    assert fit(file, tmp_path, "r", "--trainer.profiler", "simple") == 0
    assert summary(tmp_path / "r")["steps"] == 8
    assert math.isfinite(summary(tmp_path / "r")["final"]["val/loss"])


def test_the_users_logger_stands_beside_ours(recipe, tmp_path):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "theirs")}}
    for name, value in {"one": logger, "list": [logger], "true": True}.items():
        file = write_recipe(recipe, tmp_path / "logger.yaml", trainer__logger=value, trainer__max_steps=2)
        assert fit(file, tmp_path, name) == 0
        assert len(metrics_of(tmp_path / name)) == 2
    theirs = list((tmp_path / "theirs").rglob("metrics.csv"))
    assert len(theirs) == 2
    for path in theirs:
        assert "train/loss" in path.read_text().splitlines()[0]


def test_checkpoints_can_be_left_out(recipe, tmp_path, capsys):
    assert fit(recipe, tmp_path, "r", "--trainer.enable_checkpointing=false", "--trainer.max_steps=2") == 0
    assert "will not be able to go on" in capsys.readouterr().out
    assert not (tmp_path / "r/checkpoints").exists()
    assert summary(tmp_path / "r")["steps"] == 2
    assert fit(recipe, tmp_path, "s", "--trainer.enable_checkpointing=false", "--trainer.max_time=00:00:00:00") == 0
    assert "after step 0; nothing is saved to go on from" in capsys.readouterr().out


def test_a_checkpoint_is_named_by_last_or_best(recipe, run, tmp_path, capsys):
    for which in ("last", "best"):
        where = ["--trainer.fast_dev_run", "1", "--runs_dir", str(run.parent), "--name", run.name, "--ckpt_path", which]
        assert main(["validate", "--config", str(recipe), *where]) == 0
    assert fit(recipe, tmp_path, "r", *STOP, "3", "--ckpt_path", "last") == 0
    assert fit(recipe, tmp_path, "r", "--ckpt_path", "last") == 0
    assert_same_weights(tmp_path / "r", run)
    assert "a run goes on from its last" in error_of(capsys, fit(recipe, tmp_path, "r", "--ckpt_path", "best"))


def trainer_of(folder, n_steps):
    options = {"accelerator": "cpu", "max_steps": n_steps, "logger": False, "enable_checkpointing": False}
    return L.Trainer(**options, enable_progress_bar=False, default_root_dir=folder)


def module_and_data(store, **settings):
    optimizer = Optimization(learning_rate=1e-3, gradient_clip=0.1, schedule="constant", warmup_fraction=0.0)
    module = CondenserModule(backbone_config=TINY_MODEL, skip_from=1, optimizer=optimizer, **settings)
    return module, CondenserDataModule(str(store), batch_size=32, micro_batches_per_step=2, num_workers=0)


def test_from_python_loaders_alone_are_refused(store, tmp_path):
    module, data = module_and_data(store)
    data.setup("fit")
    with pytest.raises(ValueError, match="datamodule=CondenserDataModule"):
        trainer_of(tmp_path, 2).fit(module, train_dataloaders=data.train_dataloader())


def test_from_python_a_module_that_a_second_trainer_goes_on_with_is_clipped_as_before(store, tmp_path):
    (once, data), (twice, _) = module_and_data(store), module_and_data(store)
    trainer_of(tmp_path, 6).fit(once, datamodule=data)
    first = trainer_of(tmp_path, 3)
    first.fit(twice, datamodule=data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(tmp_path, 6).fit(twice, datamodule=data, ckpt_path=tmp_path / "half.ckpt")
    for name, weight in once.state_dict().items():
        assert torch.equal(weight, twice.state_dict()[name]), name


def test_from_python_a_module_is_given_another_data_module_as_if_it_were_its_first(store, spans, tmp_path):
    """RetroMAE asks for more than a Condenser does, coCondenser for pairs; loaders come to know it each time."""
    for objective, folder in ((RetroMAE, store), (CoCondenser, spans)):
        module, _ = module_and_data(folder, objective=objective)
        losses = []
        for _ in range(2):
            _, data = module_and_data(folder)
            losses += trainer_of(tmp_path, 1).validate(module, datamodule=data, verbose=False)
        assert losses[0] == losses[1]


def test_from_python_what_was_validated_can_be_saved(store, tmp_path):
    module, data = module_and_data(store)
    trainer = trainer_of(tmp_path, 1)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = CondenserModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert all(torch.equal(weight, module.state_dict()[name]) for name, weight in again.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_from_python_spawned_processes_say_where_the_trained_weights_are(strategy, store, tmp_path, capfd):
    module, data = module_and_data(store)
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_steps": 2, "logger": False}
    trainer = L.Trainer(**options, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    assert "read it with CondenserModule.load_from_checkpoint" in capfd.readouterr().out
    (path,) = tmp_path.glob("**/*.ckpt")
    assert CondenserModule.load_from_checkpoint(path, weights_only=True).model is not None


def test_from_python_a_data_module_that_gave_pairs_gives_rows_to_the_next(spans, tmp_path):
    (co, data), (plain, other) = module_and_data(spans, objective=CoCondenser), module_and_data(spans)
    trainer_of(tmp_path, 1).validate(co, datamodule=data, verbose=False)
    found = trainer_of(tmp_path, 1).validate(plain, datamodule=data, verbose=False)
    assert found == trainer_of(tmp_path, 1).validate(module_and_data(spans)[0], datamodule=other, verbose=False)


def test_from_python_a_module_of_a_checkpoint_is_trained_by_its_settings(run, store, tmp_path):
    settings = {"freeze_embeddings": True, "freeze_layers": 1, "gradient_checkpointing": True}
    path = checkpoints(run)[0]
    module = CondenserModule.load_from_checkpoint(path, weights_only=True, reinit_layers=1, **settings)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    trainer_of(tmp_path, 2).fit(module, datamodule=module_and_data(store)[1])
    assert module.model.training
    assert module.model.gradient_checkpointing
    changed = {name for name, weight in module.state_dict().items() if not torch.equal(weight, before[name])}
    assert not any("embeddings" in name or "layer.0." in name for name in changed if "c_head" not in name)
    last = [f"model.lm.bert.encoder.layer.{len(module.model.backbone.layers) - 1}.output.dense.weight"]
    assert changed.issuperset(last)
    moved = (module.state_dict()[last[0]] - before[last[0]]).abs().max()
    assert moved < 0.02  # two steps, and not drawn anew


def test_averaged_weights_are_the_mean_of_those_at_the_epochs_begins(recipe, tmp_path):
    swa = {"class_path": f"{CALLBACKS}StochasticWeightAveraging", "init_args": {"swa_lrs": 1e-3, "swa_epoch_start": 2}}
    changes = {"trainer__callbacks": [swa], "trainer__max_steps": -1, "trainer__max_epochs": 3, "data__batch_size": 248}
    changes |= {"checkpoint__every_n_steps": 4, "checkpoint__keep_last": 9}
    assert fit(write_recipe(recipe, tmp_path / "swa.yaml", **changes), tmp_path, "r") == 0
    state = {step_of(path): torch.load(path, weights_only=True)["state_dict"] for path in checkpoints(tmp_path / "r")}
    for name, averaged in final_state(tmp_path / "r")["state_dict"].items():
        torch.testing.assert_close(averaged, (state[4][name] + state[8][name]) / 2)


OPTIMIZER, OF_OPTIMIZER = ["--model.optimizer.optimizer"], ["--model.optimizer.optimizer_options"]
REFUSED = {
    "trainer.precision=bf16-true": ["--trainer.precision", "bf16-true"],
    "trainer.precision=16-mixed": ["--trainer.precision", "16-mixed"],
    "trainer.strategy=deepspeed_stage_2 ": ["--trainer.strategy", "deepspeed_stage_2"],
    "FSDPStrategy is not supported": ["--trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"],
    "trainer.accelerator=mps": ["--trainer.accelerator", "mps"],
    "trainer.logger=false": ["--trainer.logger", "false"],
    "trainer.default_root_dir cannot be used here: everything": ["--trainer.default_root_dir", "elsewhere"],
    "trainer.barebones": ["--trainer.barebones", "true"],
    "trainer: ": ["--trainer.devices", "0"],
    "No supported gpu": ["--trainer.accelerator", "gpu"],
    "val_check_interval": ["--trainer.val_check_interval", "100", "--trainer.check_val_every_n_epoch", "1"],
    "limit_val_batches": ["--trainer.limit_val_batches", "-3"],
    "max_epochs": ["--trainer.max_epochs", "-5", "--trainer.max_steps", "-1"],
    "trainer.val_check_interval=0": ["--trainer.val_check_interval", "0"],
    "trainer.log_every_n_steps=-1 must": ["--trainer.log_every_n_steps", "-1"],
    "trainer.check_val_every_n_epoch=-1": ["--trainer.check_val_every_n_epoch", "-1"],
    "LearningRateFinder cannot": ["--trainer.callbacks", "LearningRateFinder"],
    "BackboneFinetuning cannot": ["--trainer.callbacks", "BackboneFinetuning"],
    "backbone_config makes no model": ["--model.backbone_config.hidden_act", "foo"],
    "error: optimizer.learning_rate=inf must be positive and finite": ["--model.optimizer.learning_rate", ".inf"],
    "model.objective_options.temperature is the text None": ["--model.objective_options.temperature", "null"],
    "optimizer.optimizer_options.a is the text None: write null": ["--model.optimizer.optimizer_options.a", "None"],
    "fast_dev_run begins anew": ["--trainer.fast_dev_run", "1", "--ckpt_path", "some.ckpt"],
    "data.store is empty": ["--data.store", ""],
    "no token store at nowhere: make one with": ["--data.store", "nowhere", "--wandb", "offline"],
    "prepare --output nowhere": ["--data.store", "null", "--data.stores", "{nowhere: 1}", "--wandb", "offline"],
    "tokenizer has no manifest.json": ["--data.store", "STORE/tokenizer"],
    "--runs_dir is empty": ["--runs_dir", ""],
    "--model.backbone is empty": ["--model.backbone="],
    "trainer.overfit_batches=0.001 leaves": ["--trainer.overfit_batches", "0.001"],
    "trainer.limit_train_batches=0": ["--trainer.limit_train_batches", "0"],
    "trainer.limit_train_batches=0.01 leaves": [*WIDE, "--trainer.limit_train_batches", "0.01"],
    "trainer.limit_train_batches=0.0 leaves": ["--trainer.limit_train_batches", "0.0"],
    "trainer.max_steps=0, max_epochs=-1: a run of no steps": ["--trainer.max_steps", "0"],
    "max_epochs=0: a run of no steps": [*EPOCHS, "0"],
    "skip_from=3 must be in 1..2": ["--model.skip_from", "3"],
    "skip_from=0 must be in 1..2": ["--model.skip_from", "0"],
    "leaves no loss to train on": ["--model.n_head_layers", "0", "--model.late_mlm", "false"],
    "set is_decoder to false": ["--model.backbone_config.is_decoder", "true"],
    "sum to 1": ["--data.mask_rates", "[0.5,0.1,0.1]"],
    "mask_rates=[nan": ["--data.mask_rates", "[.nan,0.1,0.1]"],
    "the weights of stores must be numbers": ["--data.store", "null", "--data.stores", '{"STORE": .nan}'],
    "STORE is there twice": ["--data.store", "null", "--data.stores", '{"STORE": 1, "STORE/.": 2}'],
    "has no setting 'hiden_size'": ["--model.backbone_config.hiden_size", "3"],
    "micro_batches_per_step=2 needs at least as many": ["--data.batch_size", "1"],
    "no such folder: ./nowhere": ["--model.backbone", "./nowhere"],
    "freeze_layers=4 and reinit_layers=0: the backbone has 3 layers": ["--model.freeze_layers", "4"],
    "freeze_layers=0 and reinit_layers=-1: the backbone has 3 layers": ["--model.reinit_layers", "-1"],
    "model.vocabulary_multiple=0 must be at least 1": ["--model.vocabulary_multiple", "0"],
    "data.tokens_per_pass=0 must be at least 1": ["--data.tokens_per_pass", "0"],
    "model.cuda_graphs needs one GPU": ["--model.cuda_graphs", "true"],
    "checkpoint.every_n_steps=0 must be at least 1": ["--checkpoint.every_n_steps", "0"],
    "checkpoint.keep_last=0 must be at least 1": ["--checkpoint.keep_last", "0"],
    "checkpoint.keep_every_n_steps=-1 must be at least 0": ["--checkpoint.keep_every_n_steps", "-1"],
    "data.store or data.stores, one of them": ["--data.store", "null"],
    "give data.store or data.stores, one of them": ["--data.stores", '{"STORE": 1}'],
    "SparseAdam takes no step: SparseAdam does not support dense gradients": [*OPTIMIZER, "torch.optim.SparseAdam"],
    "LBFGS takes no step: ": [*OPTIMIZER, "torch.optim.LBFGS"],
    "Muon takes no step: Muon only supports 2D parameters": [*OPTIMIZER, "torch.optim.Muon"],
    "SGD takes no step: Invalid momentum value": [*OPTIMIZER, "torch.optim.SGD", *OF_OPTIMIZER, "{momentum: -1}"],
    "AdamW: got an unexpected keyword argument": [*OF_OPTIMIZER, "{fuzed: true}"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_by_name_in_one_line_before_any_step(what, recipe, store, tmp_path, capsys):
    runs, options = tmp_path / "new" / "runs", [word.replace("STORE", str(store)) for word in REFUSED[what]]
    error = error_of(capsys, fit(recipe, runs, "no", *options))
    assert error.startswith("condenser fit: error: ")
    assert what.replace("STORE", str(store)) in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "launch"])
def test_a_run_needs_a_name(command, recipe, tmp_path, capsys):
    assert main([command, "--config", str(recipe), "--runs_dir", str(tmp_path)]) == 1
    assert "the run needs a name: --name NAME" in capsys.readouterr().err


def test_a_metric_that_is_not_there_is_named_in_one_line(recipe, tmp_path, capsys):
    assert fit(recipe, tmp_path, "r", "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=nope") == 1
    assert "conditioned on metric `nope`" in capsys.readouterr().err.splitlines()[-1]


def test_slurms_variables_without_srun_are_one_line(recipe, tmp_path, capsys, monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job"}.items():
        monkeypatch.setenv(name, value)
    assert "--ntasks" in error_of(capsys, fit(recipe, tmp_path, "r", "--trainer.max_steps", "1"))


def test_processes_that_the_trainer_does_not_know_of_do_not_each_train_the_run(recipe, tmp_path, capsys, monkeypatch):
    expected = "give --trainer.devices the number of each node's"
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        assert expected in error_of(capsys, fit(recipe, tmp_path, "r", "--trainer.devices", "1"))
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    assert expected in error_of(capsys, fit(recipe, tmp_path, "r", "--trainer.devices", "1"))
    assert not list(tmp_path.iterdir())


def test_rows_longer_than_the_positions_are_refused_before_any_step(recipe, store, roberta, tmp_path, capsys):
    settings = {**yaml.safe_load(Path(recipe).read_text())["model"]["backbone_config"], "max_position_embeddings": 31}
    longest = 2 + max(int(TokenStore(store, split).lengths.max()) for split in ("train", "validation"))
    file = write_recipe(recipe, tmp_path / "short.yaml", model__backbone_config=settings)
    said = f"rows of up to {longest} tokens, special ones among them, and a backbone that takes 31"
    assert said in error_of(capsys, fit(file, tmp_path, "r"))
    settings["max_position_embeddings"] = longest
    path = write_recipe(recipe, file, model__backbone_config=settings)
    assert fit(path, tmp_path, "fits", "--trainer.max_steps", "1") == 0


# --- what is shown


def test_validation_is_on_the_same_tokens_whatever_the_seed(store):
    def batches(seed):
        data = data_of(store, batch_size=32, micro_batches_per_step=2, seed=seed)
        return [step.buffer for step in data.val_dataloader()], next(iter(data.train_dataloader())).buffer

    (first, train), (second, other) = batches(1), batches(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert train.shape != other.shape or not torch.equal(train, other)


def test_the_rate_that_is_shown_is_the_highest(recipe, tmp_path):
    options = ["--trainer.log_every_n_steps", "1", "--model.optimizer.warmup_fraction", "0.25"]
    several = ["--model.optimizer.layer_decay", "0.5", "--model.optimizer.head_only_steps", "4"]
    assert fit(recipe, tmp_path, "several", *options, *several) == 0
    assert fit(recipe, tmp_path, "plain", *options) == 0
    assert rates(tmp_path / "several") == rates(tmp_path / "plain")


# --- devices


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A store with an odd number of validation rows, three or more."""
    folder = tmp_path_factory.mktemp("odd")
    for n in range(66, 90):  # the first, with the tokenizers of today
        options = ["--input", str(write_jsonl(folder / f"{n}.jsonl", make_documents(n))), "--tokenizer", "train:200"]
        options += ["--max-length", "32", "--validation-fraction", "0.05", "--workers", "1"]
        assert main(["prepare", *options, "--output", str(folder / str(n))]) == 0
        if (rows := len(TokenStore(folder / str(n), "validation"))) > 2 and rows % 2:
            return folder / str(n)


@pytest.mark.parametrize("strategy", [DDP, SHARDED])
def test_validation_rows_that_devices_cannot_share_evenly_are_each_counted_once(strategy, recipe, odd, tmp_path):
    """With more micro-batches than rows each row is a pass, and one device has one more of them."""
    changes = {"data__store": str(odd), "data__batch_size": 64, "data__micro_batches_per_step": 64}
    changes |= {"trainer__max_steps": 1}
    alone = write_recipe(recipe, tmp_path / "alone.yaml", **changes)
    assert fit(alone, tmp_path, "alone") == 0
    two = write_recipe(recipe, tmp_path / "two.yaml", **changes, trainer__devices=2, trainer__strategy=strategy)
    ranks = start_ranks(2, [["--config", str(two), "--runs_dir", str(tmp_path), "--name", "two"]], tmp_path / "log")
    wait_for(ranks, tmp_path / "log", seconds=90)
    (ours,), (theirs,) = ([row for row in metrics_of(tmp_path / name) if row["val/loss"]] for name in ("two", "alone"))
    for name in ("val/loss", "val/mlm_loss", "val/mlm_accuracy", "val/unigram_loss_at_mask"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("devices", [2, 4])
def test_all_devices_have_as_many_passes_of_a_validation_and_count_each_row_once(devices, rows, store):
    data = data_of(store)
    mixture = Mixture([TokenStore(store, "validation")], [rows / len(TokenStore(store, "validation"))], seed=0)
    assert len(mixture) == rows
    counted, n_passes = [], set()
    for rank in range(devices):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=devices)
        (batch,) = data.loader(mixture, rows, min(4, rows), training=False)
        n_passes.add(len(batch))
        counted += [i for fields in batch if not fields["again"] for i in fields["sample_ids"].tolist()]
    assert len(n_passes) == 1
    assert n_passes.pop() >= 1
    assert len(counted) == len(set(counted)) == rows


class Spoils(Callback):
    """Makes the losses of the second device infinite at a step, and leaves the gradient as it is."""

    def on_train_start(self, trainer, pl_module):
        guard, watch = pl_module.guard, pl_module.guard.watch

        def spoiled(step, batch, losses, norm, asked):
            bad = step == 3 and trainer.global_rank == 1
            return watch(step, batch, losses + torch.inf if bad else losses, norm, asked)

        guard.watch = spoiled


def test_a_loss_that_is_not_finite_on_one_device_alone_stops_all_with_one_cause(recipe, tmp_path):
    changes = {"trainer__devices": 2, "trainer__strategy": DDP, "trainer__log_every_n_steps": 1}
    changes |= {"trainer__callbacks": [{"class_path": "test_ending.Spoils"}], "checkpoint__every_n_steps": 1}
    path = write_recipe(recipe, tmp_path / "two.yaml", **changes)
    arguments = ["--config", str(path), "--runs_dir", str(tmp_path), "--name", "r"]
    ranks = start_ranks(2, [arguments], tmp_path / "log", {"CONDENSER_TRACEBACK": ""})
    for process in ranks:
        process.join(90)
    assert all(process.exitcode == 1 for process in ranks)
    said = [Path(f"{tmp_path / 'log'}-{rank}").read_text() for rank in range(2)]
    assert [text.count("not finite at step 3: the loss of micro-batch") for text in said] == [1, 0]
    assert step_of(checkpoints(tmp_path / "r")[0]) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_left_out_does_not_decay_weights_either(fused):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_condenser()

    module = Holder()
    start = {n: torch.zeros_like(p) + 3 for n, p in module.model.named_parameters() if n.startswith("lm.")}
    settings = Optimization(weight_decay=0.5, decay_to_start=True, optimizer_options={"fused": fused})
    optimizer = build_optimizer(module, settings, start)
    before = [p.clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan if fused else 0.0)
    if fused:
        optimizer.found_inf = torch.ones(())
    optimizer.step()
    same = [torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert all(same) == fused


# --- command lines


def test_arguments_of_functions_are_read_as_users_write_them(run, store, tmp_path, capsys):
    out = str(tmp_path / "a.html")
    assert main(["report", "--output", out, str(run), str(run)]) == 0
    config = tmp_path / "c.yaml"
    config.write_text(f"runs: ['{run}']\noutput: '{tmp_path / 'b.html'}'\n")
    assert main(["report", "--config", str(config)]) == 0
    assert (tmp_path / "b.html").is_file()
    assert main(["inspect", str(store), "--samples=1", "--no-verify"]) == 0
    assert main(["inspect", "--verify", str(store), "--samples", "0"]) == 0
    assert "all files agree" in capsys.readouterr().out


WRONG = {
    "no command 'foo'": ["foo"],
    "unrecognized arguments: --outptu": ["prepare", "--input=a", "--tokenizer=b", "--output=c", "--outptu", "x"],
    "--trainer.max_step 3: did you mean trainer.max_steps?": ["fit", "--trainer.max_step", "3"],
    "--max_steps 3: did you mean trainer.max_steps?": ["fit", "--max_steps", "3"],
    "--skip_from 3: did you mean model.skip_from?": ["estimate", "--skip_from", "3"],
    "--data.batchsize 3: did you mean data.batch_size?": ["launch", "--data.batchsize", "3"],
    "--inputs a: did you mean input?": ["prepare", "--inputs", "a"],
    "top.yaml: there is no setting max_steps: did you mean trainer.max_steps?": ["fit", "-c", "top.yaml"],
    "tab.yaml, line 2 begins with a tab: YAML is indented by spaces": ["fit", "-c", "tab.yaml"],
    "inner.yaml, line 3 begins with a tab: YAML is indented by spaces": ["bench", "--config", "inner.yaml"],
    "--config is given twice, and this command takes one recipe": ["bench", "--config", "demo", "-c", "ddp"],
    "tab.yaml, line 2 begins with a tab": ["inspect", "a", "-c", "tab.yaml"],
    "twice.yaml cannot be read: trainer is there twice in line 3": ["fit", "-c", "twice.yaml"],
    "latin.yaml cannot be read: 'utf-8' codec can't decode": ["fit", "-c", "latin.yaml"],
    "bare.yaml: data has no settings below it, indented": ["fit", "-c", "demo", "-c", "bare.yaml"],
    "dots.yaml: there is no setting data.batch_size; dots are for the command line": ["fit", "-c", "dots.yaml"],
    "number.yaml: there is no setting 1": ["fit", "-c", "number.yaml"],
    'Parser key "data.batch_size": Expected a int. Got value: None': ["fit", "-c", "demo", "-c", "null.yaml"],
    "'batchsize': did you mean data.batch_size?": ["estimate", "-c", "demo", "-c", "nested.yaml"],
    "deep.yaml: Parser key \"model\": Group 'optimizer' does not accept option": ["launch", "-c", "deep.yaml"],
    'type.yaml: Parser key "max_length": Expected a int': ["prepare", "-c", "type.yaml"],
    "error: model.skip_from is null: give it a value": ["estimate", "-c", "demo", "--model.skip_from", "null"],
    "seed_everything=True: give a number from 0": ["fit", "-c", "demo", "--seed_everything", "true"],
    "seed_everything=-1: give a number from 0": ["fit", "-c", "demo", "--seed_everything", "-1"],
    "nth.yaml is a recipe of `condenser fit`; -c takes settings of this command": ["inspect", "a", "-c", "nth.yaml"],
    "demo is a recipe of `condenser fit`; -c takes": ["prepare", "--config", "demo"],
    "error: no model is set: give --config RECIPE (such as --config demo) (": ["fit"],
    "error: no model is set: give --config RECIPE": ["launch"],
    "error: no model is set: give --config": ["validate", "--name", "x"],
    "learning_rat": ["fit", "--model.optimizer.learning_rat", "1"],
    "--data.layout packed: did you mean data.mask_unit?": ["fit", "--data.layout", "packed"],
    'Parser key "objective": Expected an import path': ["fit", "--model.objective", "torch.nn.Linear"],
    'Parser key "optimizer.optimizer": Expected': ["fit", "--model.optimizer.optimizer", "torch.nn.Linear"],
    "module 'torch.optim' has no attribute 'Nothing'": ["fit", "--model.optimizer.optimizer", "torch.optim.Nothing"],
    'Parser key "data.batch_size"': ["fit", "--data.batch_size", "many"],
    "['online', 'offline', 'off']": ["fit", "--wandb", "true"],
    "following arguments are required: model, output": ["evaluate"],
    'Parser key "step": - Expected a int': ["export", "a", "--output", "b", "--step", "x"],
    "--rounds 0 must be at least 1": ["bench", "--rounds", "0"],
    "--max-length 1 must be at least 4": ["bench", "--max-length", "1"],
    "twice.json cannot be read: data is there twice": ["fit", "-c", "twice.json"],
    "--batch-size 7 must be at least 8": ["bench", "data", "--batch-size", "7"],
    "--rounds -1 must be at least 1": ["bench", "data", "--rounds", "-1"],
    "no attribute 'Retro'": ["bench", "--objective", "condenser.models.retromae.Retro"],
    "Expected an import path": ["bench", "--objective", "json.JSONDecoder"],
    "--json . is a folder": ["estimate", "-c", "demo", "--json", "."],
    "top.yaml/sub": ["bench", "--json", "top.yaml/sub/x.json"],
    "error: no such file: no-such.jsonl": ["bench", "data", "--tokenizer", "a", "--input", "no-such.jsonl"],
    "--nodes 0 must be at least 1": ["launch", "--name", "x", "--nodes", "0", "--dry-run"],
    "File does not exist": ["fit", "--config", "no-such.yaml"],
}

WRONG_FILES = {
    "top.yaml": "max_steps: 3\n",
    "tab.yaml": "trainer:\n\tmax_steps: 3\n",
    "inner.yaml": "trainer:\n  max_steps: 3\n\taccelerator: cpu\n",
    "twice.yaml": "trainer:\n  max_steps: 3\ntrainer:\n  accelerator: cpu\n",
    "twice.json": '{"data": {"batch_size": 3}, "data": {"num_workers": 0}}',
    "latin.yaml": "name: caf\xe9\n",
    "bare.yaml": "data:\ntrainer:\n  max_steps: 3\n",
    "dots.yaml": "data.batch_size: 3\n",
    "number.yaml": "1: 3\n",
    "null.yaml": "data:\n  batch_size: null\n",
    "nested.yaml": "data:\n  batchsize: 3\n",
    "deep.yaml": "model:\n  optimizer:\n    learning_rat: 3\n",
    "type.yaml": "max_length: many\n",
    "nth.yaml": "data:\n  masking_options:\n    n: 3\n",
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_command_lines_are_one_line(what, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in WRONG_FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert what in error_of(capsys, main(WRONG[what]))
