"""Stops training at a loss or gradient that is not finite, and when a signal asks for it, on all devices after the same
step, without making any step wait for the device.

A step's flags are copied to the host while the next step is computed, and read at its end. The optimizer skips the bad
step on the device, so the weights stay as they were before it.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condenser.data.collate import StepBatch
from condenser.models.files import write_file
from condenser.training.failures import one_line


class Watched(NamedTuple):
    flags: Tensor  # bools on the host: each loss is finite; the step is, everywhere; asked to stop, to start again
    copied: Any  # CUDA event, None where the copy is not asynchronous
    batch: StepBatch
    step: int


class Guard:
    """Watches one step after the other.

    Args:
        folder: where the batch of a bad step is saved.
        all_reduce: adds up a tensor over all devices.
    """

    stop = requeue = False  # some device was asked to stop, or to be started again; all know after the same step

    def __init__(self, folder: Path, rank: int = 0, all_reduce: Callable[[Tensor], Tensor] = lambda values: values):
        self.folder, self.rank, self.all_reduce = folder, rank, all_reduce
        self.before: Watched | None = None

    def watch(self, step: int, batch: StepBatch, losses: Tensor, norm: Tensor, requests: Tensor) -> Tensor:
        """Note the losses of a step (``[passes]``, and of a contrast over all of them), its gradient norm, and how many
        devices ask to stop, to be started again (``requests``, ``[2]``); look at those of the step before.

        Returns:
            1.0 where something is not finite on some device, else 0.0: what optimizers call ``found_inf``.

        Raises:
            ValueError: the step before was not finite. On the first device; the others end without a word.
        """
        finite = torch.cat([losses, norm[None]]).isfinite()
        bad = self.all_reduce((~finite.all()).float()) > 0
        flags = torch.cat([finite[:-1], ~bad[None], requests > 0])
        on_host, event = flags, None
        if flags.is_cuda:
            on_host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.check()
        self.before = Watched(on_host, event, batch, step)
        return bad.float()

    def check(self) -> None:
        """Raises ValueError if the last step that was watched was not finite, SystemExit on devices but the first."""
        if self.before is None:
            return
        watched, self.before = self.before, None
        if watched.copied is not None:
            watched.copied.synchronize()
        *losses, finite, stop, requeue = watched.flags.tolist()
        self.stop, self.requeue = self.stop or stop or requeue, self.requeue or requeue
        if finite:
            return
        path = self.folder / f"not-finite-step={watched.step}-rank={self.rank}.pt"
        found = dict.fromkeys(chain(*on_all_devices([*bad_losses([*watched.batch], losses)])))
        kept = f"its batch is in {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                write_file([*watched.batch], file)
        except (OSError, RuntimeError) as error:  # torch's writer may not say why
            kept = f"its batch could not be saved ({one_line(error)})"
        if self.rank > 0:
            raise SystemExit(1)
        raise ValueError(
            f"not finite at step {watched.step}: {'; '.join(found) or 'the gradient (all losses are finite)'}. "
            f"The step was skipped; {kept}. Lower the learning rate, clip the gradient, lengthen the "
            "warm-up, or look at these samples; the same command goes on from the newest checkpoint"
        )


def bad_losses(passes: list[Any], finite: list[bool]) -> Iterator[str]:
    """What is not finite, in words: of passes, or beyond them of the contrast."""
    for fields, ok in zip(passes, finite, strict=False):
        if not ok:
            samples = str(fields["sample_ids"].tolist())[1:-1]
            yield f"the loss of micro-batch {fields['micro_batch']}, samples {samples}"
    if all(finite[: len(passes)]) and not all(finite):
        yield "the contrast of the [CLS] vectors"


def on_all_devices(found: Any) -> list[Any]:
    """What each device has found."""
    if not torch.distributed.is_initialized():
        return [found]
    everywhere = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, found)
    return everywhere
