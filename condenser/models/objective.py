"""What is minimised: sums of losses over a pass, by name.

An objective is a file beside this one with a subclass of `Objective`, which a YAML names. A step computes several
passes, on one device or many, so a loss is a *sum*; the training step divides it by how many of them the whole step
has: minimised is the sum over terms of ``weight * sum / count``.

Legend: B sequences, L padded length, T tokens, M masked tokens, H hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from condenser.models.attention import Sequences
from condenser.models.backbones.base import backbone_of
from condenser.models.flops import Work
from condenser.models.losses import IGNORED

COUNTS = ("n_masked", "n_tokens", "n_sequences")  # host ints of every pass that a term may be divided by


class Term(NamedTuple):
    """A summand of the objective over one pass; dummies add nothing to it."""

    sum: Tensor  # fp32 scalar
    over: str = "n_masked"  # which of the step's `COUNTS` makes it a mean
    weight: float = 1.0
    losses: Tensor | None = None  # of each masked token (or whatever it sums over), with ``score`` alone
    correct: Tensor | None = None  # bool, likewise


class Objective(nn.Module):
    """A masked LM and what is trained on it.

    Args:
        lm: a Hugging Face masked LM, which is kept, not copied.
    """

    terms: tuple[str, ...] = ()  # their names

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm, self.backbone = lm, backbone_of(lm)
        self.gradient_checkpointing = False  # recompute every layer in the backward pass, with the same dropout
        self.fused_loss = False  # see `token_losses`

    def losses(self, batch: dict[str, Any], score: bool = False) -> dict[str, Term]:
        """The terms of a flat pass (`condenser.data.collate.collate` says what is in it).

        It may be compiled, and replayed as a CUDA graph: of the batch's host ints it reads ``max_seqlen`` and
        ``max_query`` alone, and it does not ask for values of tensors.
        """
        raise NotImplementedError

    def flops(self, work: Work) -> float:
        """Operations that training on so much needs."""
        raise NotImplementedError

    def run(self, layer: Any, hidden: Tensor, where: Sequences, at_queries: bool = False) -> Tensor:
        """A layer's output ``[T, H]``, or ``[Q, H]`` at the queries alone."""
        run = getattr(layer, "run", None)  # where weights are sharded, a method that gathers them: see sharding.py
        arguments = (hidden, where, at_queries) if run else (layer, hidden, where, at_queries)
        run = run or self.backbone.run
        if self.gradient_checkpointing and self.training:
            return checkpoint(run, *arguments, use_reentrant=False)
        return run(*arguments)


def flattened(
    backbone: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, token_type_ids: Tensor | None = None
) -> dict[str, Any]:
    """Padded rows ``[B, L]`` (``labels`` -100 where nothing is scored) as a flat pass. On a GPU this waits for it.

    Raises:
        ValueError: no rows, or one without a token.
    """
    real = attention_mask.bool()
    lengths = real.sum(1)
    if len(lengths) == 0:
        raise ValueError("a batch of no rows")
    if not bool(lengths.all()):
        raise ValueError(f"row {int((lengths == 0).nonzero()[0])} of attention_mask has no token")
    flat_labels = labels[real]
    begins = nn.functional.pad(lengths.cumsum(0), (1, 0))
    masked = flat_labels != IGNORED
    is_read = masked.clone()
    is_read[begins[:-1]] = True
    n_read = torch.stack([part.sum() for part in is_read.split(lengths.tolist())])
    query_index = is_read.nonzero()[:, 0]
    return {
        "input_ids": input_ids[real],
        "position_ids": backbone.positions(real.long())[real],
        "token_type_ids": None if token_type_ids is None else token_type_ids[real],
        "cu_seqlens": begins,
        "masked_index": masked.nonzero()[:, 0],
        "labels": flat_labels[masked].long(),
        "query_index": query_index,
        "cu_seqlens_query": nn.functional.pad(n_read.cumsum(0), (1, 0)),
        "masked_slot": masked[query_index].nonzero()[:, 0],
        "max_seqlen": int(lengths.max()),
        "max_query": int(n_read.max()),
        "n_sequences": len(lengths),
        "n_tokens": int(begins[-1]),
        "n_masked": int(masked.sum()),
    }


def padded(flat: Tensor, attention_mask: Tensor) -> Tensor:
    """``[T, ...]`` -> ``[B, L, ...]``, 0 at padding."""
    rows = flat.new_zeros(*attention_mask.shape, *flat.shape[1:])
    rows[attention_mask.bool()] = flat
    return rows
