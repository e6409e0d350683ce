"""Exact over time: a run that was killed anywhere and goes on is the run that was left alone."""

import copy
import itertools
import json
import os
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, data_of, slow
from lightning.pytorch.callbacks import Callback
from test_devices import DDP, start_ranks, wait_for, write_recipe
from test_training import assert_same_weights, final_state, metrics_of
from transformers import BertConfig, BertForMaskedLM

from condenser.cli import main
from condenser.data.steps import Steps
from condenser.runs import checkpoints, step_of
from condenser.training.checkpoints import Checkpoints

N_STEPS, N_MICRO = 20, 2
LATE = 1_000_001  # within an epoch of 8 steps


class Diary(Callback):
    """Writes which samples each step reads, as soon as it begins."""

    def __init__(self, file: str):
        self.path = Path(file)

    def on_train_start(self, trainer, pl_module):
        self.attempt = f"{os.getpid()} from {trainer.global_step}"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        read = {str(micro_batch["micro_batch"]): micro_batch["sample_ids"].tolist() for micro_batch in batch}
        with open(f"{self.path}-{trainer.global_rank}", "a") as file:
            file.write(json.dumps({"attempt": self.attempt, "step": trainer.global_step, "read": read}) + "\n")


def entries(path):
    """What a diary says, but for a line that is not finished."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Run:
    """A run of two and a half epochs with dropout, to be started again and again by any number of processes."""

    def __init__(self, recipe, folder, name, **changes):
        self.folder, self.recipe, self.name, self.changes = folder, recipe, name, changes
        self.path, self.log = folder / name, folder / f"{name}-log"

    def arguments(self, devices, workers, n_steps=None):
        callbacks = [{"class_path": "test_resume.Diary", "init_args": {"file": str(self.folder / f"{self.name}-read")}}]
        if n_steps is not None:
            callbacks.append({"class_path": "test_training.StopAfter", "init_args": {"n_steps": n_steps}})
        settings = {
            "data__batch_size": 128,
            "checkpoint__every_n_steps": 2,
            "trainer__max_steps": N_STEPS,
            "trainer__val_check_interval": 8,
        }
        path = write_recipe(
            self.recipe,
            self.folder / f"{self.name}.yaml",
            data__num_workers=workers,
            trainer__devices=devices,
            trainer__strategy=DDP if devices > 1 else "auto",
            trainer__callbacks=callbacks,
            **settings | self.changes,
        )
        return ["--config", str(path), "--runs_dir", str(self.folder), "--name", self.name]

    def here(self, workers=0, n_steps=None, options=()):
        assert main(["fit", *self.arguments(1, workers, n_steps), *options]) == 0

    def on(self, devices, workers=0, n_steps=None):
        wait_for(start_ranks(devices, [self.arguments(devices, workers, n_steps)], self.log), self.log)

    def killed(self, devices, workers, at):
        """Started, and all processes killed at some time after the first has begun step ``at``."""
        ranks = start_ranks(devices, [self.arguments(devices, workers)], self.log)
        deadline = time.monotonic() + 120
        while not any(e["attempt"].startswith(f"{ranks[0].pid} ") and e["step"] >= at for e in self.entries(0)):
            assert time.monotonic() < deadline, Path(f"{self.log}-0").read_text()[-3000:]
            assert ranks[0].exitcode is None, Path(f"{self.log}-0").read_text()[-3000:]
            time.sleep(0.002)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        assert not (self.path / "summary.json").exists(), "killed too late to test anything"

    def entries(self, rank):
        return entries(self.folder / f"{self.name}-read-{rank}")

    def steps(self, rank=0):
        """The steps that count: of each attempt those before the next one's first."""
        attempts = defaultdict(list)
        for entry in self.entries(rank):
            attempts[entry["attempt"]].append(entry["step"])
        kept = []
        for steps in attempts.values():
            assert steps == list(range(steps[0], steps[0] + len(steps)))
            kept = [step for step in kept if step < steps[0]] + steps
        return kept

    def read(self):
        """The samples of each step's micro-batches, over all processes. A step done again reads the same."""
        found = defaultdict(dict)
        for path in self.folder.glob(f"{self.name}-read-*"):
            for entry in self.entries(path.name.rsplit("-", 1)[-1]):
                for number, samples in entry["read"].items():
                    assert found[entry["step"]].setdefault(number, samples) == samples
        return dict(found)


def assert_same_state(a, b):
    """Weights, optimizer and counters, bit for bit."""
    assert_same_weights(a, b)
    first, second = final_state(a), final_state(b)
    for key in ("global_step", "epoch", "lr_schedulers", "tokens_seen"):
        assert first[key] == second[key], f"{key} differs"
    first, second = (state["optimizer_states"][0]["state"] for state in (first, second))
    assert first.keys() == second.keys()
    for number, values in first.items():
        for name, value in values.items():
            assert torch.equal(value, second[number][name]), f"{name} of weight {number} differs"


def assert_same_run(a, b):
    assert_same_state(a.path, b.path)
    assert metrics_of(a.path) == metrics_of(b.path)
    assert a.read() == b.read()


@pytest.fixture(scope="module")
def samples(store):
    """How many samples an epoch has, and how many steps."""
    module = data_of(store, batch_size=128, micro_batches_per_step=N_MICRO)
    return len(module.train), module.train_dataloader().dataset.batches.steps_per_epoch


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The run on one process, left alone."""
    run = Run(recipe, tmp_path_factory.mktemp("alone"), "alone")
    run.here()
    return run


@pytest.fixture(scope="module")
def changing(alone, recipe):
    """The run on one process, then on two, then on one."""
    run = Run(recipe, alone.folder, "changing")
    run.here(n_steps=4)
    run.on(2, n_steps=6)
    run.here()
    return run


def test_a_run_killed_at_random_and_resumed_equals_uninterrupted_bit_for_bit(alone, recipe, samples, tmp_path):
    """In its first epoch and in its second, with and without loader workers. On two processes: see the ten kills."""
    run, steps_per_epoch = Run(recipe, tmp_path, "killed"), samples[1]
    at = random.randint(3, steps_per_epoch - 1), random.randint(steps_per_epoch + 2, 2 * steps_per_epoch - 1)
    print(f"killed at {at}")
    run.killed(1, workers=0, at=at[0])
    run.killed(1, workers=2, at=at[1])
    run.on(1, workers=2)
    assert_same_run(alone, run)
    assert run.steps() == alone.steps()


def test_no_batch_is_left_out_and_none_is_read_twice(alone, samples):
    n_samples, steps_per_epoch = samples
    assert alone.steps() == list(range(N_STEPS))
    read = alone.read()
    for epoch in range(N_STEPS // steps_per_epoch):
        steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        epochs_samples = [sample for step in steps for ids in read[step].values() for sample in ids]
        assert sorted(epochs_samples) == list(range(n_samples))


@pytest.mark.slow
def test_two_ranks_with_a_contrast_killed_at_random_and_resumed_equal_uninterrupted(recipe, spans, tmp_path):
    """Spans are cut anew in each epoch, and siblings are on two devices."""
    contrast = {"model__objective": "condenser.models.cocondenser.CoCondenser", "data__span_length": 12}
    contrast |= {"data__store": str(spans), "data__batch_size": 64, "trainer__max_steps": 20}
    runs = [Run(recipe, tmp_path, name, **contrast) for name in ("left", "killed")]
    runs[0].on(2)
    at = random.randint(3, 16)
    print(f"killed at {at}")
    runs[1].killed(2, workers=2, at=at)
    runs[1].on(2, workers=0)
    assert_same_run(*runs)


def test_resumed_on_another_number_of_processes_the_same_batches_make_the_same_steps(alone, changing):
    assert changing.steps() == alone.steps()
    assert changing.read() == alone.read()
    assert_same_weights(alone.path, changing.path, rtol=1e-3, atol=5e-5)
    ours, theirs = metrics_of(changing.path), metrics_of(alone.path)
    ours, theirs = ([row for row in rows if row["train/loss"]] for rows in (ours, theirs))
    assert len(ours) == len(theirs) == N_STEPS // 2
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/mlm_accuracy"):
            assert float(mine[key]) == pytest.approx(float(other[key]), rel=2e-3), (key, mine["step"])
        for key in ("step", "epoch", "train/tokens_seen", "train/sequences"):
            assert mine[key] == other[key]


def test_checkpoints_load_without_unpickling_anything_but_tensors(alone, changing):
    for path in [*checkpoints(alone.path), *checkpoints(changing.path)]:
        assert torch.load(path, weights_only=True)["global_step"] == step_of(path)


def as_if_at(checkpoint, step, steps_per_epoch):
    """A checkpoint with its counters as they are after ``step`` steps; Lightning's own are made from that number."""
    checkpoint = copy.deepcopy(checkpoint)
    checkpoint |= {"epoch": step // steps_per_epoch, "global_step": step}
    for schedule in checkpoint["lr_schedulers"]:
        schedule |= {"last_epoch": step, "_step_count": step + 1}
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["step"].fill_(step)
    return checkpoint


def counters(checkpoint):
    schedules = [{**state, "_last_lr": None} for state in checkpoint["lr_schedulers"]]
    steps = {float(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()}
    return checkpoint["epoch"], checkpoint["global_step"], schedules, steps


@pytest.fixture
def long_run(recipe, tmp_path):
    """A run of a million steps and more, stopped after four; and its first checkpoint."""
    run = Run(recipe, tmp_path, "long", trainer__max_steps=LATE + 3)
    run.here(n_steps=4)
    return run, final_state(run.path)


def test_resuming_at_step_one_million_replays_nothing(long_run, recipe, samples, store, monkeypatch):
    """The counters are set, which is shown to be right where both are at hand: at a step of the next epoch."""
    (run, checkpoint), steps_per_epoch = long_run, samples[1]
    run.here(n_steps=10)
    assert steps_per_epoch == 8
    assert counters(final_state(run.path)) == counters(as_if_at(checkpoint, 14, steps_per_epoch))

    assert LATE % steps_per_epoch
    produced, get = [], Steps.__getitem__
    monkeypatch.setattr(Steps, "__getitem__", lambda steps, step: (produced.append(step), get(steps, step))[1])
    seconds = {}
    for name, step in (("early", 5), ("late", LATE)):
        path = run.folder / f"{name}.ckpt"
        torch.save(as_if_at(checkpoint, step, steps_per_epoch), path)
        again = Run(recipe, run.folder, name, trainer__max_steps=LATE + 3)
        produced.clear()
        began = time.monotonic()
        again.here(n_steps=2, options=["--ckpt_path", str(path)])
        seconds[name] = time.monotonic() - began
        assert again.steps() == [step, step + 1]
        assert [made for made in produced if made >= step] == [step, step + 1]
        assert len(produced) < 20  # these, and those of validation
        assert final_state(again.path)["global_step"] == step + 2
    assert seconds["late"] < 3 * seconds["early"] + 5

    module = data_of(store, batch_size=128, micro_batches_per_step=N_MICRO, seed=1)
    batches, epoch = module.train_dataloader().dataset.batches, LATE // steps_per_epoch
    for step, read in again.read().items():
        numbers = batches.step(step)
        expected = [module.train.samples(epoch, samples).ids.tolist() for samples in numbers]
        assert list(read.values()) == expected


def test_with_averaged_weights_resumed_equals_uninterrupted(recipe, tmp_path):
    average = ["--trainer.callbacks+", "lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay"]
    runs = [Run(recipe, tmp_path, name, trainer__max_steps=8) for name in ("left", "stopped")]
    runs[0].here(options=[*average, "0.9"])
    runs[1].here(n_steps=4, options=[*average, "0.9"])
    runs[1].here(options=[*average, "0.9"])
    assert_same_state(*(run.path for run in runs))
    states = [final_state(run.path) for run in runs]
    for key in ("current_model_state", "averaging_state"):
        assert all(torch.equal(value, states[1][key][name]) for name, value in states[0][key].items())
    averaged = states[0]["state_dict"]
    assert any(not torch.equal(value, averaged[name]) for name, value in states[0]["current_model_state"].items())


def test_in_double_precision_from_a_backbone_in_fp32_resumed_equals_uninterrupted(recipe, store, tmp_path):
    BertForMaskedLM(BertConfig(**TINY_MODEL, vocab_size=200)).save_pretrained(tmp_path / "bert")
    shutil.copytree(store / "tokenizer", tmp_path / "bert", dirs_exist_ok=True)
    double = ["--trainer.precision", "64-true", "--model.backbone", str(tmp_path / "bert")]
    double += ["--model.backbone_config", "{}"]
    runs = [Run(recipe, tmp_path, name, trainer__max_steps=8) for name in ("left", "stopped")]
    runs[0].here(options=double)
    runs[1].here(n_steps=4, options=double)
    runs[1].here(options=double)
    assert_same_state(*(run.path for run in runs))


ENDS = {
    "within an epoch": {"trainer__max_steps": 10},
    "after an epoch": {"trainer__max_steps": 12},
    "by epochs": {"trainer__max_steps": -1, "trainer__max_epochs": 3},
    "often validated": {
        "trainer__max_steps": 10,
        "trainer__val_check_interval": 2,
        "trainer__check_val_every_n_epoch": None,
    },
}
GUESTS = {
    "alone": [],
    "EMAWeightAveraging": [{"decay": 0.9}],
    "StochasticWeightAveraging": [{"swa_lrs": 1e-3, "swa_epoch_start": 1, "annealing_epochs": 2}],
    "EarlyStopping": [{"monitor": "val/loss"}],
}
QUICK = [("within an epoch", "alone", "step"), ("by epochs", "StochasticWeightAveraging", "last")]
ALL = [slow(*each) for each in itertools.product(ENDS, GUESTS, ["file"])]


@pytest.mark.parametrize(("end", "guest", "every"), [*QUICK, *ALL])
def test_a_run_that_was_killed_after_any_of_its_checkpoints_ends_as_if_it_had_not_been(
    end, guest, every, recipe, tmp_path, monkeypatch
):
    guests = [{"class_path": f"lightning.pytorch.callbacks.{guest}", "init_args": args} for args in GUESTS[guest]]
    every_epoch = {"trainer__val_check_interval": 1.0, "trainer__check_val_every_n_epoch": 1}
    changes = {"data__batch_size": 248, "checkpoint__every_n_steps": 3, "trainer__callbacks": guests}
    file = write_recipe(recipe, tmp_path / "r.yaml", **changes, **every_epoch | ENDS[end])
    arguments = ["fit", "--config", str(file), "--runs_dir", str(tmp_path), "--name"]
    left, save = tmp_path / "left", Checkpoints.save

    def saved(self, trainer, path, ends=False):
        done = save(self, trainer, path, ends)
        shutil.copytree(left, tmp_path / f"killed-after-{len(list(tmp_path.iterdir()))}-{path.stem}")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", saved)
        assert main([*arguments, "left"]) == 0

    def summary(run):
        content = json.loads((run / "summary.json").read_text())
        return content | {"seconds_since_last_start": None}

    killed = sorted(tmp_path.glob("killed-after-*"))
    assert len(killed) > 5
    if every != "file":  # of several files of one step one
        killed = [*{path.name.partition("=")[2]: path for path in killed}.values()]
    for run in killed[-3 if every == "last" else 0 :]:
        assert not (run / "summary.json").exists()
        assert main([*arguments, run.name]) == 0
        assert_same_state(run, left)
        assert metrics_of(run) == metrics_of(left), run
        assert summary(run) == summary(left), run
        assert checkpoints(run)[0].name == checkpoints(left)[0].name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_random_kills_change_nothing(workers, recipe, tmp_path):
    steps = {"trainer__max_steps": 120, "checkpoint__every_n_steps": 3}
    runs = [Run(recipe, tmp_path, name, **steps) for name in ("left", "killed")]
    runs[0].on(2)
    at = sorted(random.sample(range(4, 115), 10))
    print(f"killed at {at}")
    for step in at:
        runs[1].killed(2, workers, step)
    runs[1].on(2, workers)
    assert_same_run(*runs)
    assert runs[1].steps() == list(range(120))
