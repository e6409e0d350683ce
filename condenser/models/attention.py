"""Transformer layers evaluated only where somebody reads the result.

Legend: B sequences, L padded length, Q query positions of a sequence, H hidden size.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.masking_utils import create_bidirectional_mask


def padding_mask(config: PretrainedConfig, embeddings: Tensor, attention_mask: Tensor) -> Any:
    """The mask that the layers of this attention implementation take, from ``attention_mask`` ``[B, L]``."""
    if config._attn_implementation == "sdpa":
        return attention_mask[:, None, None, :].bool()  # the library's own mask waits for the device (`.all()`)
    return create_bidirectional_mask(config=config, inputs_embeds=embeddings, attention_mask=attention_mask)


def run_layer(layer: Any, hidden: Tensor, mask: Tensor | None, query_index: Tensor | None = None) -> Tensor:
    """A layer's output at every position ``[B, L, H]``, or at ``query_index`` ``[B, Q]`` alone: ``[B, Q, H]``.

    Equal to the whole layer's output at those positions: keys and values are still taken from all of ``hidden``.
    """
    if query_index is None:
        return layer(hidden, mask)
    if layer.gradient_checkpointing and layer.training:
        return checkpoint(layer_at, layer, hidden, mask, query_index, use_reentrant=False)
    return layer_at(layer, hidden, mask, query_index)


def layer_at(layer: Any, hidden: Tensor, mask: Tensor | None, query_index: Tensor) -> Tensor:
    queries = hidden.gather(1, query_index[..., None].expand(-1, -1, hidden.shape[-1]))
    attention = layer.attention.self
    query, key, value = (
        projection(states).unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        for projection, states in ((attention.query, queries), (attention.key, hidden), (attention.value, hidden))
    )
    dropout = attention.dropout.p if layer.training else 0.0
    keys_mask = None if mask is None else mask[:, :, :1]  # alike for all queries: the [CLS] row of [B, 1, 1 or L, L]
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=keys_mask, dropout_p=dropout)
    attended = layer.attention.output(context.transpose(1, 2).flatten(2), queries)
    return layer.feed_forward_chunk(attended)


def checkpoint_layers(layers: Iterable[Any]) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations; dropout is drawn alike."""
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute


def recompute(function: Callable, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def flat_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the loss reads, from ``labels`` ``[B, L]`` (-100 = not scored). On a GPU this waits for the device.

    Returns:
        masked_index ``[M]`` into ``[B * L]``; query_index ``[B, Q]``, [CLS] then the masked positions, padded with 0;
        masked_slot ``[M]``, where the masked positions are in ``[B * Q]``.
    """
    masked = labels != -100
    rows, columns = masked.nonzero(as_tuple=True)
    rank = masked.cumsum(1)[rows, columns]  # 1 for a row's first masked position: slot 0 is [CLS]
    n_queries = int(masked.sum(1).max()) + 1
    query_index = torch.zeros(len(labels), n_queries, dtype=torch.long, device=labels.device)
    query_index[rows, rank] = columns
    return rows * labels.shape[1] + columns, query_index, rows * n_queries + rank
