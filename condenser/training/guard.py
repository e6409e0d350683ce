"""Stops training at a loss or gradient that is not finite, without making any step wait for the device.

A step's flags are copied to the host while the next step is computed, and read at its end. The optimizer skips the bad
step on the device, so the weights stay as they were before it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Watched(NamedTuple):
    flags: Tensor  # host bools: each micro-batch's loss is finite, and the gradient
    copied: Any  # CUDA event, None where the copy is not asynchronous
    micro_batches: list[dict[str, Any]]
    step: int


class FiniteGuard:
    """Watches one step after the other.

    Args:
        folder: where the batch of a bad step is saved.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank
        self.before: Watched | None = None

    def watch(self, step: int, micro_batches: list[dict[str, Any]], losses: list[Tensor], norm: Tensor) -> Tensor:
        """Note a step's losses and gradient norm, look at those of the step before.

        Returns:
            1.0 where something is not finite, else 0.0, on the device: what optimizers call ``found_inf``.

        Raises:
            ValueError: the step before was not finite.
        """
        finite = torch.stack([*losses, norm]).isfinite()
        event = None
        if finite.is_cuda:
            flags = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
            flags.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            flags = finite
        self.check()
        self.before = Watched(flags, event, micro_batches, step)
        return (~finite.all()).float()

    def check(self) -> None:
        """Raises ValueError if the last step that was watched was not finite."""
        if self.before is None:
            return
        watched, self.before = self.before, None
        if watched.copied is not None:
            watched.copied.synchronize()
        *losses, gradient = watched.flags.tolist()
        if all(losses) and gradient:
            return
        path = self.folder / f"not-finite-step={watched.step}-rank={self.rank}.pt"
        torch.save(watched.micro_batches, path)
        bad = "; ".join(
            f"the loss of micro-batch {batch['micro_batch']}, samples {str(batch['sample_ids'].tolist())[1:-1]}"
            for batch, ok in zip(watched.micro_batches, losses, strict=True)
            if not ok
        )
        raise ValueError(
            f"not finite at step {watched.step}: {bad or 'the gradient (the losses on this device are finite)'}. "
            f"The step was skipped; its batch is in {path}. Lower the learning rate, clip the gradient, lengthen the "
            "warm-up, or look at these samples; the same command goes on from the newest checkpoint"
        )
