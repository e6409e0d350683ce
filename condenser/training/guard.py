"""Stops training at a loss or gradient that is not finite, and when a signal asks for it, on all devices after the same
step, without making any step wait for the device.

A step's flags are copied to the host while the next step is computed, and read at its end. The optimizer skips the bad
step on the device, so the weights stay as they were before it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condenser.data.collate import StepBatch


class Watched(NamedTuple):
    flags: Tensor  # host bools: each pass's loss is finite, the gradient is; asked to stop, to be started again
    copied: Any  # CUDA event, None where the copy is not asynchronous
    batch: StepBatch
    step: int


class Guard:
    """Watches one step after the other.

    Args:
        folder: where the batch of a bad step is saved.
    """

    stop = requeue = False  # some device was asked to stop, or to be started again; all know after the same step

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank
        self.before: Watched | None = None

    def watch(self, step: int, batch: StepBatch, losses: Tensor, norm: Tensor, asked: Tensor) -> Tensor:
        """Note the losses of a step (``[passes]``, and of a contrast over all of them), its gradient norm, and how many
        devices are ``asked`` to stop, to be started again ``[2]``; look at those of the step before.

        Returns:
            1.0 where something is not finite, else 0.0, on the device: what optimizers call ``found_inf``.

        Raises:
            ValueError: the step before was not finite.
        """
        finite = torch.cat([losses, norm[None]]).isfinite()
        flags = torch.cat([finite, asked > 0])
        on_host, event = flags, None
        if flags.is_cuda:
            on_host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.check()
        self.before = Watched(on_host, event, batch, step)
        return (~finite.all()).float()

    def check(self) -> None:
        """Raises ValueError if the last step that was watched was not finite."""
        if self.before is None:
            return
        watched, self.before = self.before, None
        if watched.copied is not None:
            watched.copied.synchronize()
        *losses, gradient, stop, requeue = watched.flags.tolist()
        self.stop, self.requeue = self.stop or stop or requeue, self.requeue or requeue
        if all(losses) and gradient:
            return
        path = self.folder / f"not-finite-step={watched.step}-rank={self.rank}.pt"
        passes = [*watched.batch]
        torch.save(passes, path)
        bad = "; ".join(
            f"the loss of micro-batch {fields['micro_batch']}, samples {str(fields['sample_ids'].tolist())[1:-1]}"
            for fields, ok in zip(passes, losses, strict=False)
            if not ok
        )
        if not bad and not all(losses):
            bad = "the contrast of the [CLS] vectors"
        raise ValueError(
            f"not finite at step {watched.step}: {bad or 'the gradient (the losses on this device are finite)'}. "
            f"The step was skipped; its batch is in {path}. Lower the learning rate, clip the gradient, lengthen the "
            "warm-up, or look at these samples; the same command goes on from the newest checkpoint"
        )
