"""Checkpoints that a run can be trusted to go on from, whatever ended it and whenever.

A checkpoint is whole once it has its name, and is removed only when later ones are. It is taken when the step's metrics
are written and its validation is done; where a run is stopped before that, it is the first thing done when the run goes
on. A disk that is full ends training on all devices, and one line says so. What is damaged later is found by
`condenser.runs.is_intact`.
"""

import errno
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from condenser.data.store import atomic_write, leftovers
from condenser.models.files import load_file, write_file
from condenser.runs import seal, step_of
from condenser.training.ending import averaging

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Checkpointing:
    """When checkpoints are saved, and which are kept; the best by validation loss is kept too.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep_last: how many of the newest are kept: if one is damaged, the run goes on from the one before.
        keep_every_n_steps: keep those of every so many steps for good; 0 keeps none.
        on_full_disk: stop training, or continue without saving until there is space again.
    """

    every_n_steps: int = 1000
    keep_last: int = 2
    keep_every_n_steps: int = 0
    on_full_disk: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("keep_last", 1), ("keep_every_n_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least {least}")

    def due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or self.kept(step)

    def kept(self, step: int) -> bool:
        return bool(self.keep_every_n_steps) and step % self.keep_every_n_steps == 0


class FullDiskError(OSError):
    """There is no space for a file."""


class Sealed:
    """Passes on what is written to a file, if there is one, and knows its size and checksum."""

    def __init__(self, file: Any = None):
        self.file, self.size, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        if self.file is not None:
            self.file.write(data)
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)
        return len(data)

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint under another name, renames it when it is on disk, and says why if it cannot.

    Args:
        before: puts on disk what has to be there before the checkpoint is.
    """

    def __init__(self, before: Callable[[], None] = lambda: None):
        self.before = before

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            self.before()
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial, open(partial, "wb") as file:
                save(checkpoint, file)
            sync_folder(path.parent)
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if cause.errno not in FULL:
                raise
            needed: Any = Sealed()
            torch.save(checkpoint, needed)
            free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
            raise FullDiskError(
                f"{path} cannot be written: {os.strerror(cause.errno)}; it needs {needed.size / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free. Earlier checkpoints are kept; make space and start the run again"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_file(path)


def save(checkpoint: dict[str, Any], file: Any) -> None:
    sealed: Any = Sealed(file)
    write_file(checkpoint, sealed)
    file.write(seal(sealed.crc))


def sync_folder(folder: Path) -> None:
    """Renamed files have their names on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(run: Path) -> None:
    """What a process was writing when it was killed."""
    for leftover in leftovers(run, "*", "checkpoints/*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves ``last-step=N.ckpt`` at the steps that are due, at the end and where a run is stopped, and
    ``best-step=N.ckpt`` at the lowest validation loss; logs the seconds that this took since the last logging step."""

    def __init__(self, folder: Path, settings: Checkpointing):
        self.folder, self.settings = folder, settings
        self.best, self.best_step = float("inf"), -1
        self.last_step = self.first_step = -1
        self.lasts: list[int] = []  # steps of the newest that are whole, oldest first; those kept for good drop out
        self.bests: list[int] = []
        self.damaged: set[int] = set()
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def path(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}-step={step}.ckpt"

    def steps(self, kind: str) -> list[int]:
        return sorted(step_of(path) for path in self.folder.glob(f"{kind}-step=*.ckpt"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first_step = first = trainer.global_step
        found, self.bests = (self.steps(kind) for kind in ("last", "best"))
        self.lasts, self.damaged = [step for step in found if step <= first], {step for step in found if step > first}
        if not trainer.strategy.broadcast(self.path("best", self.best_step).is_file()):
            self.best, self.best_step = float("inf"), -1  # the run began with another's checkpoint

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """What the step before has led to is logged, and its validation is done."""
        step = trainer.global_step
        if step not in (self.first_step, self.last_step) and self.settings.due(step):
            self.save_last(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.seconds and pl_module.is_logging_step(trainer.global_step):
            pl_module.log("perf/checkpoint_seconds", self.seconds)
            self.seconds = 0.0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss, step = float(trainer.callback_metrics.get("val/loss", torch.nan)), trainer.global_step
        if trainer.strategy.reduce_boolean_decision(loss < self.best):
            before = self.best, self.best_step
            self.best, self.best_step = loss, step
            if self.save(trainer, self.path("best", step)):
                self.bests.append(step)
            else:
                self.best, self.best_step = before
        if step == self.first_step:  # what was owed is done
            self.save_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.should_stop and not self.is_averaged_at_end(trainer, pl_module):
            self.save_last(trainer, ends=True)  # before callbacks end training, which may leave other weights

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.last_step != trainer.global_step or self.is_averaged_at_end(trainer, pl_module):
            self.save_last(trainer, ends=True)

    def is_averaged_at_end(self, trainer: L.Trainer, pl_module: Any) -> bool:
        """The average takes the place of the weights, which nothing goes on from then."""
        return bool(averaging(trainer)) and pl_module.stopped is None

    def save_last(self, trainer: L.Trainer, ends: bool = False) -> None:
        if self.save(trainer, self.path("last", trainer.global_step), ends):
            self.last_step = trainer.global_step
            if trainer.is_global_zero:
                self.remove_old()

    def save(self, trainer: L.Trainer, path: Path, ends: bool = False) -> bool:
        """Whether there is a checkpoint now; on all devices the same.

        Raises:
            OSError: there is none and training cannot go on, on the first device; the others end without a word.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        began, failure = time.perf_counter(), None
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:  # on the first device, which writes; the others wait at this barrier
            failure = error
            trainer.strategy.barrier("Trainer.save_checkpoint")
        self.seconds += time.perf_counter() - began
        goes_on = isinstance(failure, FullDiskError) and self.settings.on_full_disk == "continue" and not ends
        failed, goes_on = trainer.strategy.broadcast((failure is not None, goes_on))
        if failed and not goes_on:
            raise failure if failure is not None and trainer.is_global_zero else SystemExit(1)
        if failed and trainer.is_global_zero:
            print(f"{failure}. Training goes on without it", file=sys.stderr)
        return not failed

    def remove_old(self) -> None:
        """All but the newest that are whole, without reading the folder, which grows with what is kept for good."""
        if self.last_step not in self.lasts:
            self.lasts.append(self.last_step)
        n = self.settings.keep_last
        old = [step for step in self.lasts[:-n] if not self.settings.kept(step)]
        for step in (*old, *self.damaged.difference(self.lasts)):
            self.path("last", step).unlink(missing_ok=True)
        self.lasts, self.damaged = self.lasts[-n:], set()
        if self.path("best", self.best_step).is_file():
            for step in {*self.bests} - {self.best_step}:
                self.path("best", step).unlink(missing_ok=True)
            self.bests = [self.best_step]
