"""A million steps of everything but the model: as much memory, time and file work at the end as at the start."""

import gc
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from test_training import metrics_of

from condenser.data.batching import BucketedBatches
from condenser.data.collate import StepBatch
from condenser.data.mixing import Mixture
from condenser.data.steps import StepLoader
from condenser.data.synthetic import SyntheticStore
from condenser.runs import read_metrics
from condenser.training.checkpoints import Checkpointing, Checkpoints, WholeFiles
from condenser.training.guard import Guard
from condenser.training.logs import MetricsCSV, Speed
from condenser.training.optim import Optimization, build_schedule

STREAMS = [f"train/{name}" for name in ("loss", "mlm_loss", "head_mlm_loss", "mlm_accuracy", "grad_norm")]
TOKENS = 131_072  # of a step: those of a million steps are more than fp32 counts


class Steps:
    """Item i: the samples of step i."""

    def __init__(self, n_steps, epochs):
        stores = [SyntheticStore(n_steps // epochs), SyntheticStore(n_steps // epochs)]
        self.mixture = Mixture(stores, [1.0, 2.0], seed=3)
        settings = {"batch_size": 4, "micro_batches_per_step": 1, "window": 64}
        self.batches = BucketedBatches(self.mixture, seed=3, **settings)

    def __getitem__(self, step):
        epoch, numbers = step // self.batches.steps_per_epoch, self.batches.step(step)
        return StepBatch.of(
            [{"sample_ids": self.mixture.samples(epoch, each).ids, "micro_batch": i} for i, each in enumerate(numbers)]
        )


class Run:
    """Does what Lightning and the module do around the model; is both to the callbacks."""

    should_stop = sanity_checking = fast_dev_run = False
    is_global_zero, world_size, device = True, 1, torch.device("cpu")

    def __init__(self, folder, n_steps, log_every, validate_every, epochs=10, **saving):
        self.n_steps, self.log_every, self.validate_every = n_steps, log_every, validate_every
        self.metrics = MetricsCSV(folder, log_every)
        self.metrics.begin_at(0)
        self.files, self.guard, self.speed = WholeFiles(before=self.metrics.flush), Guard(folder), Speed()
        self.checkpoints = Checkpoints(folder / "checkpoints", Checkpointing(**saving))
        self.loader = self.train_dataloader = StepLoader(Steps(n_steps, epochs), training=True, num_workers=0)
        weight = torch.nn.Parameter(torch.ones(4))
        self.optimizer = torch.optim.AdamW([{"params": [weight], "waits": False}], lr=1e-3, fused=True)
        self.schedule = build_schedule(self.optimizer, Optimization(learning_rate=1e-3), n_steps)
        self.global_step, self.tokens_seen, self.flops_needed = 0, 0, 0.0
        self.samples, self.logged, self.callback_metrics, self.callbacks = 0, {}, {}, []
        self.strategy = SimpleNamespace(
            broadcast=lambda value: value, barrier=lambda name: None, reduce_boolean_decision=lambda value: value
        )

    def is_logging_step(self, step):
        return step % self.log_every == 0

    def log(self, name, value, **kwargs):
        self.logged[name] = value

    def write_metrics(self):
        if self.logged and self.is_logging_step(self.global_step):
            epoch = self.global_step // self.loader.dataset.batches.steps_per_epoch
            self.metrics.log_metrics({**self.logged, "epoch": epoch}, self.global_step - 1)

    def save_checkpoint(self, path, weights_only):
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule", "loader", "checkpoints")}
        self.files.save_checkpoint({"global_step": self.global_step, "weights": torch.ones(100), **state}, path)

    def steps(self):
        """One after the other, to look at what each has left."""
        for callback in (self.speed, self.checkpoints):
            callback.on_train_start(self, self)
        while True:
            for micro_batches in self.loader:
                self.training_step(micro_batches)
                self.speed.on_train_batch_end(self, self, None, micro_batches, 0)
                self.checkpoints.on_train_batch_end(self, self)
                self.write_metrics()
                self.logged.clear()
                if self.global_step % self.validate_every == 0:
                    self.callback_metrics["val/loss"] = torch.tensor(1.0 / self.global_step)
                    self.metrics.log_metrics({"val/loss": 1.0 / self.global_step}, self.global_step - 1)
                    self.checkpoints.on_validation_end(self, self)
                self.should_stop = self.global_step == self.n_steps
                self.checkpoints.on_train_epoch_end(self, self)
                self.checkpoints.on_train_batch_start(self, self)  # as the next begins
                yield self.global_step
                if self.global_step == self.n_steps:
                    self.checkpoints.on_train_end(self, self)
                    return

    def training_step(self, micro_batches):
        one, asked = torch.ones(()), torch.zeros(2)
        not_finite = self.guard.watch(self.global_step + 1, micro_batches, torch.ones(len(micro_batches)), one, asked)
        self.optimizer.found_inf = not_finite
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_step += 1
        self.tokens_seen += TOKENS
        self.samples += sum(len(batch["sample_ids"]) for batch in micro_batches)
        if self.is_logging_step(self.global_step):
            self.logged |= dict.fromkeys(STREAMS, 1 / 3)
            self.logged |= {"train/lr": self.schedule.get_last_lr()[0], "train/tokens_seen": float(self.tokens_seen)}
        self.schedule.step()


class FileWork:
    """Counts what is done with files, while it is on."""

    def __init__(self):
        self.done, self.on = Counter(), True
        sys.addaudithook(self.note)  # for good: hooks cannot be taken off

    def note(self, event, args):
        if self.on and (event == "open" or event.startswith("os.")):
            self.done[event] += 1


class Watch:
    """Looks at a run after its steps: at each save which checkpoints there are, at each tenth what was used."""

    def __init__(self, run, memory):
        self.run, self.memory_now = run, memory
        self.files, self.memory, self.file_work, self.seconds = FileWork(), [], [], []
        self.since = time.perf_counter()

    def look(self, step):
        n, settings = self.run.n_steps, self.run.checkpoints.settings
        if step % (n // 100) == 0:
            self.seconds.append(time.perf_counter() - self.since)
        self.files.on = False
        if step % settings.every_n_steps == 0:
            steps = {step, step - settings.every_n_steps, *range(0, step, settings.keep_every_n_steps)} - {0}
            best = step - step % self.run.validate_every
            expected = {f"last-step={kept}.ckpt" for kept in steps} | ({f"best-step={best}.ckpt"} if best else set())
            assert set(os.listdir(self.run.checkpoints.folder)) == expected
        if step % (n // 10) == 0:
            gc.collect()
            self.memory.append(self.memory_now())
            self.file_work.append(self.files.done)
            self.files.done = Counter()
        self.files.on = True
        if step % (n // 100) == 0:
            self.since = time.perf_counter()


def traced():
    return tracemalloc.get_traced_memory()[0]


def resident():
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize(
    ("n_steps", "save_every", "memory"),
    [
        pytest.param(10_000, 50, traced, id="10k", marks=pytest.mark.slow),
        pytest.param(1_000_000, 1000, resident, id="1M", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_the_end_of_a_long_run_needs_what_its_start_did(n_steps, save_every, memory, tmp_path, request):
    saving = {"every_n_steps": save_every, "keep_every_n_steps": n_steps // 50}
    run = Run(tmp_path, n_steps, log_every=n_steps // 2000, validate_every=n_steps // 100, **saving)
    if memory is traced:
        tracemalloc.start()
        request.addfinalizer(tracemalloc.stop)
    watch = Watch(run, memory)
    for step in run.steps():
        watch.look(step)
    watch.files.on = False

    tenths = [sum(watch.seconds[i : i + 10]) for i in range(0, 100, 10)]
    print("seconds a tenth:", *(f"{s:.1f}" for s in tenths), "; MB:", *(f"{m / 1e6:.2f}" for m in watch.memory))
    # bytes a step; once, the interpreter may make its table of interned strings anew, which is 8 MB
    assert np.median(np.diff(watch.memory)) < 16 * n_steps / 10
    assert watch.memory[-1] - watch.memory[0] < 24e6
    assert watch.file_work[-1] == watch.file_work[1]
    assert not {"os.listdir", "os.scandir"} & set(watch.file_work[-1])
    if memory is resident:
        assert min(watch.seconds[-10:]) < 1.5 * min(watch.seconds[:10])

    rows = metrics_of(tmp_path, skip=())
    assert [int(row["step"]) + 1 for row in rows if row["train/loss"]] == [
        *range(n_steps // 2000, n_steps + 1, n_steps // 2000)
    ]
    assert len(rows) == 2000 + 100
    assert (tmp_path / "metrics.csv").stat().st_size < 200 * len(rows)
    curves = read_metrics(tmp_path / "metrics.csv")
    assert curves["train/tokens_seen"][1][-1] == n_steps * TOKENS
    rates = curves["train/lr"][1]
    assert rates.max() == pytest.approx(1e-3, rel=0.01)
    assert rates[-1] == pytest.approx(1e-3 / (0.9 * n_steps), rel=1e-6)
    saving = curves["perf/checkpoint_seconds"][1]
    print("ms a save:", *(f"{1000 * np.median(part):.2f}" for part in np.array_split(saving, 10)))
    if memory is resident:
        assert np.quantile(saving[-100:], 0.1) < 3 * np.quantile(saving[:100], 0.1)
    assert run.samples == pytest.approx(4 * n_steps, rel=0.001)


def test_rows_that_a_full_disk_refuses_cost_no_more_the_more_there_are(tmp_path, monkeypatch):
    rendered = []
    append = MetricsCSV.append
    monkeypatch.setattr(MetricsCSV, "append", lambda self, row: rendered.append(1) or append(self, row))
    metrics = MetricsCSV(tmp_path)
    metrics.begin_at(0)
    metrics.log_metrics({"a": 0.0}, 0)
    path, metrics.path = metrics.path, Path("/dev/full")
    for step in range(1, 1000):
        metrics.log_metrics({"a": step}, step)
    assert len(rendered) < 1100
    with pytest.raises(OSError, match="No space left"):
        metrics.flush()
    metrics.path = path
    metrics.log_metrics({"a": 1000.0}, 1000)
    assert [float(row["a"]) for row in metrics_of(tmp_path)] == [*range(1001)]
    assert not metrics.unwritten


def test_metrics_of_every_step_are_gone_on_with_and_read_in_little_memory(tmp_path):
    """In memory as text they take more than ten times as much."""
    n, names = 10_000, [f"train/{i}" for i in range(10)]
    lines = (f"{step},0,{','.join(str(step / 3 + i) for i in range(10))}\n" for step in range(n))
    (tmp_path / "metrics.csv").write_text(",".join(["step", "epoch", *names]) + "\n" + "".join(lines))
    tracemalloc.start()
    try:
        metrics = MetricsCSV(tmp_path)
        metrics.begin_at(n - 1)
        metrics.log_metrics({"another": 1.0}, n - 1)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        curves = read_metrics(tmp_path / "metrics.csv")
        assert tracemalloc.get_traced_memory()[1] < 40 * n * 11
    finally:
        tracemalloc.stop()
    assert all((curves[name][0] == np.arange(n - 1)).all() for name in names)
    assert [each.tolist() for each in curves["another"]] == [[n - 1], [1.0]]


VARIED = """
import sys, torch
from condenser.training.device import keep_few_kernels

def resident():  # the most that getrusage tells of begins with what the parent had
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

if sys.argv[1] == "few":
    keep_few_kernels()
layer = torch.nn.Linear(128, 384)
for n in range(500, 900):
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(n, 128)).sum().backward()
    if n == 510:
        before = resident()
print(resident() - before)
"""


@pytest.mark.slow
def test_in_half_precision_a_cpu_does_not_keep_a_kernel_of_every_shape():
    grown, command = {}, [sys.executable, "-c", VARIED]
    without = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}  # set by runs
    for kept in ("few", "all"):
        done = subprocess.run([*command, kept], check=True, capture_output=True, text=True, env=without)
        grown[kept] = int(done.stdout)
    assert grown["few"] < 0.75 * grown["all"], grown
