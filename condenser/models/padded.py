"""The door for padded rows, as of notebooks and Hugging Face's Trainer: they become a flat pass, and states rows again.

Legend: B sequences, L padded length, T tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from condenser.models.backbones.base import longest_text
from condenser.models.losses import IGNORED


def flattened(
    backbone: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    token_type_ids: Tensor | None = None,
) -> dict[str, Any]:
    """Padded rows ``[B, L]`` (``labels`` -100 where nothing is scored) as a flat pass. On a GPU this waits for it.
    Padding within a text is left out: where distances count, those on both its sides are neighbours.

    Raises:
        ValueError: no labels, no rows, one without a token, or one of more than the backbone takes.
    """
    if labels is None:
        raise ValueError("labels are needed: [B, L], -100 where nothing is scored")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = attention_mask.bool()
    lengths = real.sum(1)
    longest = longest_text(backbone.lm.config)
    if longest and len(lengths) and int(lengths.max()) > longest:
        raise ValueError(f"a row of {int(lengths.max())} tokens, and a backbone that takes {longest}")
    if len(lengths) == 0:
        raise ValueError("a batch of no rows")
    if not bool(lengths.all()):
        raise ValueError(f"row {int((lengths == 0).nonzero()[0])} of attention_mask has no token")
    flat_labels = labels[real]
    begins = nn.functional.pad(lengths.cumsum(0), (1, 0))
    masked = flat_labels != IGNORED
    is_read = masked.clone()
    is_read[begins[:-1]] = True
    cu_query = nn.functional.pad(is_read.cumsum(0), (1, 0)).index_select(0, begins)
    query_index = is_read.nonzero()[:, 0]
    return {
        "input_ids": input_ids[real],
        "position_ids": backbone.positions(real.long())[real],
        "token_type_ids": None if token_type_ids is None else token_type_ids[real],
        "cu_seqlens": begins,
        "masked_index": masked.nonzero()[:, 0],
        "labels": flat_labels[masked].long(),
        "query_index": query_index,
        "cu_seqlens_query": cu_query,
        "masked_slot": masked[query_index].nonzero()[:, 0],
        "max_seqlen": int(lengths.max()),
        "max_query": int(cu_query.diff().max()),
        "n_sequences": len(lengths),
        "n_tokens": int(begins[-1]),
        "n_masked": int(masked.sum()),
    }


def padded(flat: Tensor, attention_mask: Tensor) -> Tensor:
    """``[T, ...]`` -> ``[B, L, ...]``, 0 at padding."""
    rows = flat.new_zeros(*attention_mask.shape, *flat.shape[1:])
    rows[attention_mask.bool()] = flat
    return rows


def before_masking(batch: dict[str, Any], drawn_anew: bool = False) -> dict[str, Any]:
    """The tokens of a flat pass as they were, -100 at the first and the last of each sequence; and keys ``[B]``, by
    which a decoder draws what it sees: others in each batch, or always the same."""
    original = batch["input_ids"].index_copy(0, batch["masked_index"], batch["labels"].to(batch["input_ids"].dtype))
    bounds = batch["cu_seqlens"]
    original = original.index_fill(0, torch.cat([bounds[:-1], bounds[1:] - 1]), IGNORED)
    keys = torch.arange(len(bounds) - 1, device=bounds.device)
    if drawn_anew:
        keys = torch.randint(2**31, keys.shape, device=bounds.device)
    return {"original_ids": original, "keys": keys, "n_ordinary": int((original != IGNORED).sum())}
