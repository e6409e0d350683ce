"""Transformer layers, evaluated only where somebody reads the result, over padded or packed sequences.

Padded: states ``[B, L, H]`` and a mask. Packed: states ``[1, T, H]``, the real tokens of all sequences one after the
other, which costs nothing for padding; needs a variable-length attention kernel to be quick (CUDA, bf16).

Legend: B sequences, L padded length, T packed tokens, Q query positions (of a sequence in [B, Q], of all in [Q]),
H hidden size, A attention heads, D their size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_bidirectional_mask, sdpa_mask

PACKED = "condenser_packed"  # the attention implementation of packed sequences, for `lm.set_attn_implementation`


class Sequences(NamedTuple):
    """Where the sequences of a batch lie, and at which positions the last layers are needed."""

    query_index: Tensor  # [B, Q] padded, [Q] packed
    mask: Any = None  # padded: as the layers' attention implementation takes it
    cu_seqlens: Tensor | None = None  # packed: bounds of the sequences [B + 1], int32
    cu_seqlens_query: Tensor | None = None  # packed: bounds of their queries [B + 1], int32
    max_seqlen: int = 0
    max_query: int = 0


def padding_mask(config: PretrainedConfig, embeddings: Tensor, attention_mask: Tensor) -> Any:
    """The mask that the layers of this attention implementation take, from ``attention_mask`` ``[B, L]``."""
    if config._attn_implementation in ("sdpa", PACKED):
        return attention_mask[:, None, None, :].bool()  # the library's own mask waits for the device (`.all()`)
    return create_bidirectional_mask(config=config, inputs_embeds=embeddings, attention_mask=attention_mask)


def run_layer(layer: Any, hidden: Tensor, where: Sequences, pruned: bool) -> Tensor:
    """A layer's output everywhere, or with ``pruned`` at the queries alone: ``[B, Q, H]``, ``[1, Q, H]`` packed.

    Equal to the whole layer's output at those positions: keys and values are still taken from all of ``hidden``.
    """
    if pruned:
        return layer.at_queries(hidden, where) if hasattr(layer, "at_queries") else layer_at(layer, hidden, where)
    if where.cu_seqlens is None:
        return layer(hidden, where.mask)
    return layer(hidden, None, cu_seqlens=where.cu_seqlens, max_seqlen=where.max_seqlen)


def layer_at(layer: Any, hidden: Tensor, where: Sequences) -> Tensor:
    if where.cu_seqlens is None:
        queries = hidden.gather(1, where.query_index[..., None].expand(-1, -1, hidden.shape[-1]))
    else:
        queries = hidden.index_select(1, where.query_index)
    attention = layer.attention.self
    query, key, value = (
        projection(states).unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        for projection, states in ((attention.query, queries), (attention.key, hidden), (attention.value, hidden))
    )
    if where.cu_seqlens is None:
        dropout = attention.dropout.p if layer.training else 0.0
        keys_mask = None if where.mask is None else where.mask[:, :, :1]  # of [B, 1, 1 or L, L]: alike for all queries
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=keys_mask, dropout_p=dropout)
        context = context.transpose(1, 2)
    else:
        bounds = where.cu_seqlens_query, where.cu_seqlens
        context = attend_packed(query, key, value, *bounds, where.max_query, where.max_seqlen)
    return layer.feed_forward_chunk(layer.attention.output(context.flatten(2), queries))


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, cu_query: Any, cu_key: Any, max_query: int, max_key: int
) -> Tensor:
    """Every query ``[1, A, Q, D]`` over the keys and values ``[1, A, T, D]`` of its own sequence: ``[1, Q, A, D]``.

    On CUDA in half precision this is the variable-length kernel. Elsewhere it is the reference that the kernel is
    tested against, whose work and memory go with Q x T.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        longest = (-(-length // 128) * 128 for length in (max_query, max_key))  # bounds suffice; few for compilers
        attended: Any = varlen_attn(query, key, value, cu_query, cu_key, *longest)
        return attended[None]
    of_query, of_key = (
        torch.bucketize(torch.arange(states.shape[2], device=states.device), bounds, right=True)
        for states, bounds in ((query, cu_query), (key, cu_key))
    )
    own = of_query[:, None] == of_key
    return F.scaled_dot_product_attention(query, key, value, attn_mask=own).transpose(1, 2)


def packed_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attend_packed` as Hugging Face's layers call it; without ``cu_seqlens`` their padded attention."""
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert not options.get("dropout"), "the variable-length kernel has no attention dropout"
    return attend_packed(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), None


AttentionInterface.register(PACKED, packed_attention_forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)


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
