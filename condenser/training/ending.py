"""When a run ends, and what its end is called: one rule for each.

A run is *finished* when training ended of itself: by its length, or because a callback asked for it (EarlyStopping, for
one). It is *stopped* by a signal, by ``trainer.max_time`` or by an error, and then it can go on. Its length is counted
in steps, and so is where it goes on: Lightning's own counters are set from that one number.
"""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, Timer
from lightning.pytorch.utilities import rank_zero_only

from condenser.data.store import write_json
from condenser.models.files import load_file
from condenser.runs import CONFIG, METRICS, SUMMARY, changed_keys, length, read_mapping, read_metrics, step_of
from condenser.training.logs import hardware, versions

SIGNAL, TIME = "a signal", "trainer.max_time"
LENGTH = {"trainer.max_steps", "trainer.max_epochs"}  # of a run, which may be made longer


def length_of(trainer: Any) -> int:
    """Optimizer steps of the whole run. (Lightning's own estimate sets up the loader before it is told where a run goes
    on.)

    Raises:
        ValueError: there is no end, or nothing before it.
    """
    found = length(trainer.max_steps, trainer.max_epochs, trainer.datamodule.steps_per_epoch)
    if found is None:
        raise ValueError("the schedule needs to know when the run ends: set trainer.max_epochs or max_steps")
    if found < 1:
        raise ValueError(f"trainer.max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs}: a run of no steps")
    return found


def goes_on(run: Path, checkpoint: Path, settings: dict[str, Any]) -> bool:
    """Whether a run with these ``settings`` has something left to do from this checkpoint on: it is not finished, or is
    made longer.

    Raises:
        ValueError: it was started with other settings, or is to be shorter than it is already.
    """
    before, step = read_mapping(run / CONFIG), step_of(checkpoint)
    changed = [] if before is None else changed_keys(before, settings)
    if others := [key for key in changed if key not in LENGTH]:
        raise ValueError(
            f"{run} was started with another {', '.join(others)}; give the run another --name, or go on with the "
            "settings it has"
        )
    if changed:
        limits, per_epoch = settings["trainer"], load_file(checkpoint, mmap=True).get("steps_per_epoch")
        wanted = length(limits["max_steps"], limits["max_epochs"], per_epoch)
        if wanted is not None and wanted < step:
            raise ValueError(f"{run} has taken {step:,} steps, more than {', '.join(changed)} allows ({wanted:,})")
        return True
    summary = read_mapping(run / SUMMARY)
    return summary is None or summary.get("steps") != step


def stopped_by(trainer: Any, asked: bool) -> str | None:
    """What stops a run before its end, where that is no callback of the user's; on all devices the same."""
    timers = (each for each in trainer.callbacks if isinstance(each, Timer))
    late = any((left := each.time_remaining()) is not None and left <= 0 for each in timers)
    return trainer.strategy.broadcast(SIGNAL if asked else TIME if late else None)


def validation_follows(trainer: Any, step: int) -> bool:
    """Whether Lightning validates after this step, were training to go on. (At times of day it may, or not.)"""
    every, n_epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not isinstance(every, int):
        return False
    if n_epochs is None:
        return step % every == 0
    epoch, done = divmod(step - 1, trainer.num_training_batches)
    return (epoch + 1) % n_epochs == 0 and (done + 1) % every == 0


def averaging(trainer: Any) -> list[StochasticWeightAveraging]:
    """Callbacks that put an average in the place of the weights when training has ended."""
    return [each for each in trainer.callbacks if isinstance(each, StochasticWeightAveraging)]


def loops_at(loops: dict[str, Any], step: int, per_epoch: int, by_steps: bool, owed: bool = False) -> dict[str, Any]:
    """Lightning's state of its loops, as it is in checkpoints, of a run that has taken so many steps.

    It is what Lightning reads as "within an epoch, at the end of a training batch", or as "before an epoch". So a run
    goes on from any checkpoint, also where an epoch has another number of steps now.

    Args:
        by_steps: the trainer has a ``max_steps``: Lightning then goes on within an epoch always, else after it.
        owed: the validation that follows this step is still to be done: "within a validation".
    """
    epoch, done = divmod(step, per_epoch)
    if owed and not done:
        epoch, done = epoch - 1, per_epoch  # the epoch ends after it

    def counts(begun: int, completed: int) -> dict[str, int]:
        return {"ready": begun, "started": begun, "processed": begun, "completed": completed}

    epochs = counts(epoch + (done > 0), epoch) | {"processed": epoch}
    within = bool(done) or by_steps
    late = int(within and not owed)  # Lightning adds it
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    none = counts(0, 0)
    return loops | {
        "epoch_progress": {"total": epochs, "current": dict(epochs)},
        "epoch_loop.state_dict": {"_batches_that_stepped": step - int(within)},
        "epoch_loop.batch_progress": {
            "total": counts(step, step - late),
            "current": counts(done, done - late),
            "is_last_batch": done == per_epoch,
        },
        "epoch_loop.manual_optimization.optim_step_progress": {
            "total": {"ready": step, "completed": step},
            "current": {"ready": step, "completed": step},
        },
        "epoch_loop.val_loop.batch_progress": {
            "total": begun if owed else none,
            "current": dict(none),
            "is_last_batch": False,
        },
    }


def go_on(trainer: Any, checkpoint: dict[str, Any], length: int) -> bool:
    """Set Lightning's loops to where a ``checkpoint`` stands, in place; whether its last validation is still owed.

    Raises:
        ValueError: it has taken more steps than the run is to have.
    """
    step, loops = checkpoint["global_step"], checkpoint["loops"]
    if step > length:
        raise ValueError(
            f"the checkpoint has taken {step:,} steps, and the run is to have {length:,}: see trainer.max_steps"
        )
    per_epoch, by_steps = trainer.datamodule.steps_per_epoch, trainer.max_steps != -1
    is_shortened = step == length < checkpoint.get("length", length) and trainer.limit_val_batches > 0
    owed = checkpoint.get("owed", False) or is_shortened
    loops["fit_loop"] = loops_at(loops["fit_loop"], step, per_epoch, by_steps, owed)
    if owed and step == length:
        trainer.fit_loop.epoch_loop.max_steps = -1  # else Lightning would leave out all that is still to be done
    return owed and step == length


class Ending(Callback):
    """Says in one line how training ended; where it is finished, writes what it was and reached. That file's presence
    says that the run is finished."""

    def __init__(self, folder: Path):
        self.folder, self.began = folder, time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """When the last checkpoint has been saved."""
        if trainer.global_step < pl_module.length and pl_module.stopped is None:  # there was no time for any step
            pl_module.stopped = stopped_by(trainer, pl_module.guard.stop)
        self.say(trainer, pl_module)

    @rank_zero_only
    def say(self, trainer: L.Trainer, pl_module: Any) -> None:
        step, whole = trainer.global_step, pl_module.length
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"fast_dev_run: {step:,} step(s) and a validation went through; nothing is kept")
        elif pl_module.stopped is not None:
            asked = pl_module.stopped == SIGNAL
            how = "was asked to stop, and did" if asked else f"was stopped by {TIME}"
            again = "start it again" if asked else "start it again with more of it"  # as a checkpoint knows its time
            then = f"{again} to go on" if trainer.checkpoint_callback else "nothing is saved to go on from"
            print(f"{self.folder} {how} after step {step:,}; {then}")
        else:
            early = "" if step == whole else f", of {whole:,}: a callback ended it"
            print(f"{self.folder} is finished: {step:,} steps{early}")
            write_json(self.folder / SUMMARY, self.facts(trainer, pl_module))

    def facts(self, trainer: Any, module: Any) -> dict[str, Any]:
        curves = read_metrics(self.folder / METRICS, may_be_empty=True)  # also of before the last start
        return {
            "steps": trainer.global_step,
            "epochs": round(trainer.global_step / module.datamodule.steps_per_epoch, 3),
            "tokens_seen": int(module.tokens_seen),
            "seconds_since_last_start": round(time.perf_counter() - self.began, 1),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "hardware": hardware(trainer),
            "precision": trainer.precision,
            "versions": versions(),
            "final": {name: float(curves[name][1][-1]) for name in sorted(curves) if name.startswith("val/")},
        }
