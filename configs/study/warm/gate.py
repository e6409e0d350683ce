"""Is there anything for `[CLS]` to carry, and is it carried? A Condenser whose head is given something in its place.

The backbone stays as it is (`optimizer.head_only_steps` for all steps), so what the head loses says what it has read:
with zeros nothing of the late layers, with the mean of the late states what there would be to carry.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from condenser.models.condenser import Condenser


class Gate(Condenser):
    """A Condenser whose head reads, in the place of [CLS], its late state (cls), zeros, or the mean of all late states.

    Args:
        read: which.
        options: those of `Condenser`.
    """

    def __init__(self, lm: Any, read: Literal["cls", "zeros", "mean"] = "cls", **options: Any):
        super().__init__(lm, **{**options, "pruned": read != "mean" and options.get("pruned", True)})
        self.read = read

    def cls_of(self, late: Tensor, batch: dict[str, Any], pruned: bool = True) -> Tensor:
        cls = super().cls_of(late, batch, pruned)  # [B, H]
        if self.read == "zeros":
            return torch.zeros_like(cls)
        if self.read == "cls":
            return cls
        bounds = batch["cu_seqlens"]
        sequence = torch.searchsorted(bounds[1:], torch.arange(len(late), device=late.device), right=True)
        return torch.zeros_like(cls).index_add(0, sequence, late) / bounds.diff()[:, None]
