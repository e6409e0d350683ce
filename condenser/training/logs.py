"""What runs beside the training loop: the metrics file, speed, traces."""

import csv
import errno
import io
import os
import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from condenser.cluster import signals
from condenser.data.store import atomic_write
from condenser.models.flops import bf16_peak
from condenser.runs import COMMIT, METRICS, output, version_of


def is_repeated(metrics: Mapping[str, float], step: int, every_n_steps: int) -> bool:
    """Where a run stops between logging steps Lightning logs the last ones again."""
    return "train/loss" in metrics and (step + 1) % every_n_steps > 0


class MetricsCSV(Logger):
    """Appends metrics to one wide CSV file; a resumed run goes on in it, after what its checkpoint had reached.

    Columns are ``step``, ``epoch``, then metrics as they turn up; a new one, which there is at the first training row
    and the first of validation, makes the file be written again, as in Lightning's own logger. Rows that a full disk
    refuses are kept (about 2 kB each) until there is space, and asked for again before a checkpoint is written. The
    file is never held in memory as a whole: it may have a row a step.

    Args:
        folder: the run's.
        every_n_steps: how often training logs.
    """

    version = ""

    def __init__(self, folder: Path, every_n_steps: int = 1):
        super().__init__()
        self.path, self.every_n_steps = folder / METRICS, every_n_steps
        self.columns: list[str] = []
        self.unwritten: deque[dict[str, Any]] = deque()
        self.last = b""  # line before those that are appended

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""

    @rank_zero_only
    def begin_at(self, step: int) -> None:
        """Cut off what was logged at or after ``step`` (steps done again after a crash), and a line cut short."""
        self.path.touch()
        with open(self.path, "r+b") as file:
            self.columns, end = next(csv.reader([file.readline().decode(errors="replace")]), []), file.tell()
            if self.columns and "step" not in self.columns:
                raise ValueError(f"{self.path} has no 'step' column: move it away, or give the run another --name")
            for number, line in enumerate(file, start=2):
                at = line.split(b",")[0]
                if line.endswith(b"\n") and not at.isdigit():
                    raise ValueError(f"{self.path}, line {number}: begins with {at[:20]!r}, which is no step")
                if not line.endswith(b"\n") or int(at) >= step:
                    break
                end, self.last = end + len(line), line
            file.truncate(end)

    def write_again(self, columns: Sequence[str]) -> None:
        """The same rows under more ``columns``."""
        with (
            open(self.path, newline="", encoding="utf-8") as file,
            atomic_write(self.path) as partial,
            open(partial, "w", newline="", encoding="utf-8") as out,
        ):
            table = csv.DictWriter(out, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(csv.DictReader(file))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        if is_repeated(metrics, step, self.every_n_steps):
            return
        row: dict[str, Any] = {"step": step, **{key: float(value) for key, value in metrics.items()}}
        row["epoch"] = int(row.get("epoch", 0))
        self.unwritten.append(row)
        with suppress(OSError):
            self.flush()

    def flush(self) -> None:
        while self.unwritten:
            self.append(self.unwritten[0])
            self.unwritten.popleft()

    def append(self, row: Mapping[str, Any]) -> None:
        columns = list(dict.fromkeys((*self.columns, "step", "epoch", *row)))
        if columns != self.columns:
            self.write_again(columns)
            self.columns = columns
        text = io.StringIO()
        csv.DictWriter(text, columns, restval="", lineterminator="\n").writerow(row)
        with open(self.path, "ab", buffering=0) as file:
            line, end = text.getvalue().encode(), file.tell()
            if line == self.last:  # a validation that was done already, after which the run was killed
                return
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


class Speed(Callback):
    """Logs, between logging steps and over all devices: real tokens per second; the share of the time that the loader
    was waited for; MFU, the operations that these tokens need (no padding, pruned layers, nothing repeated) as a share
    of the devices' bf16 peak, where that is known; and the most memory that was used. A logging step ends when the
    device has done it, so all that was asked of the device is in the time."""

    def __init__(self) -> None:
        self.since, self.before = 0.0, (0, 0.0, 0.0)
        self.peak: float | None = None

    def reached(self, trainer: Any, module: Any) -> tuple[int, float, float]:
        """Tokens, operations, seconds that the loader was waited for."""
        return module.tokens_seen, module.flops_needed, getattr(trainer.train_dataloader, "waited", 0.0)

    def start(self, trainer: Any, module: Any) -> None:
        self.since, self.before = time.perf_counter(), self.reached(trainer, module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            peak = bf16_peak(torch.cuda.get_device_name(pl_module.device))
            self.peak = peak and peak * trainer.world_size
        self.start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.count(pl_module.since.tolist())  # steps before it, which are not of the time from here on
            self.start(trainer, pl_module)  # the time that validation took is not training's

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.is_logging_step(trainer.global_step):
            return
        seconds = time.perf_counter() - self.since
        tokens, flops, waited = (
            now - before for now, before in zip(self.reached(trainer, pl_module), self.before, strict=True)
        )
        pl_module.log("perf/tokens_per_second", tokens / seconds, prog_bar=True)
        pl_module.log("perf/data_wait_fraction", waited / seconds)
        pl_module.log("perf/memory_gb", memory_gb(pl_module.device))
        if self.peak:
            pl_module.log("perf/mfu", flops / seconds / self.peak)
        self.start(trainer, pl_module)


def memory_gb(device: torch.device) -> float:
    """The most that was allocated on a GPU; on the CPU, the most memory that this process had (GB = 1e9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Listening(Callback):
    """Notes signals again, once Lightning has put handlers of its own in place (which wait for other ranks), and spares
    its question to all ranks before every step whether one was terminated, for which the host waits: see Guard."""

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.listen(signals.INTERRUPT)
        steps: Any = trainer.fit_loop.epoch_loop
        steps._broadcast_sigterm_tensor = lambda: None  # no setting leaves the question out


class Trace(Callback):
    """Writes what the CPU and the GPU did in ``n_steps`` steps, after some to warm up: ``trace.json.gz``, for
    https://ui.perfetto.dev, and the operations that took longest, ``trace.txt``."""

    def __init__(self, folder: Path, n_steps: int, skip: int = 5):
        self.folder, self.first, self.n_steps = folder, skip, n_steps
        self.profiler: Any = None

    @rank_zero_only
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.first == 0:
            self.profiler = torch.profiler.profile(profile_memory=True)
            self.profiler.start()
        self.first -= 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.profiler is not None and self.first == -self.n_steps:
            self.finish(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.profiler is not None:
            self.finish(pl_module.device)

    def finish(self, device: torch.device) -> None:
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        longest = self.profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25)
        (self.folder / "trace.txt").write_text(longest, encoding="utf-8")
        self.profiler = None


def hardware(trainer: L.Trainer) -> str:
    if torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda":
        return f"{trainer.world_size} x {torch.cuda.get_device_name()}"
    return f"{trainer.world_size} CPU process(es), {torch.get_num_threads()} threads each of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {name: version_of(name) for name in ("condenser", "torch", "lightning", "transformers")}
    return found | {"commit": commit()}


def commit() -> str:
    """What git calls the code that runs, or called it where `condenser launch` copied it from."""
    folder = Path(__file__).parents[2]
    if not any((folder / name).exists() for name in (COMMIT, ".git")):  # installed: git would find some other's
        return "unknown"
    if (folder / COMMIT).is_file():
        return (folder / COMMIT).read_text(encoding="utf-8").splitlines()[0]
    return output("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40") or "unknown"
