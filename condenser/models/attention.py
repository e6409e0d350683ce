"""Sequences in flat arrays, and attention over them.

All tokens of a pass lie one after the other; only attention knows where a sequence begins. On a GPU in half precision
it is a kernel that takes the bounds. Elsewhere, and where attention has dropout, the sequences are laid out side by
side, attended to, and put into one row again. Both give the same.

Legend: B sequences, L positions of a laid-out sequence, T tokens, Q queries (T, or the positions that the last layers
are read at), A attention heads, D their size, H = A * D.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condenser.models.short_attention import is_short, short_attention


class Take(torch.autograd.Function):
    """``rows.index_select(0, index)`` whose gradient is written to where the rows came from, not added there, which is
    quicker and always the same. So only rows without a gradient, as dummies', may be taken more than once."""

    @staticmethod
    def forward(rows: Tensor, index: Tensor) -> Tensor:
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        rows, index = inputs
        ctx.n_rows = rows.shape[0]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return put(gradient, index, ctx.n_rows), None


def take(rows: Tensor, index: Tensor) -> Tensor:
    """The rows at ``index``, see `Take`."""
    return Take.apply(rows, index)


def put(rows: Tensor, index: Tensor, n: int) -> Tensor:
    """``n`` rows, those at ``index`` (without repetitions) as given, the others 0."""
    return rows.new_zeros(n, *rows.shape[1:]).index_copy_(0, index, rows)


class Bounds(NamedTuple):
    """Where sequences lie in a flat array of ``[T]`` or ``[Q]``."""

    cu_seqlens: Tensor  # [B + 1] int32
    longest: int  # at least the length of the longest
    slots: Tensor | None = None  # [T] where each position is in [B * L]; None where the kernel takes the bounds
    mask: Tensor | None = None  # [B, 1, 1 or L, L] seen; false past the end of a sequence (not at its first position)


class Sequences(NamedTuple):
    """The sequences of a pass, and at which positions the last layers are read."""

    keys: Bounds
    queries: Bounds
    query_index: Tensor  # [Q] int64
    position_ids: Tensor  # [T] int64, as they are embedded: from 0 in each sequence, or behind its padding


def sequences_of(batch: dict[str, Any], hidden: Tensor, as_they_lie: bool) -> Sequences:
    """The sequences of a flat batch (see `condenser.data.collate.collate`), whose first states are ``hidden``.

    Args:
        as_they_lie: attend by the kernel that takes bounds, where there is one.
    """
    kernel = as_they_lie and has_kernel(hidden.device, state_type(hidden))
    query_index = batch["query_index"]
    keys = bounds_of(batch["cu_seqlens"], batch["max_seqlen"], len(batch["input_ids"]), kernel)
    queries = bounds_of(batch["cu_seqlens_query"], batch["max_query"], len(query_index), kernel)
    return Sequences(keys, queries, query_index, batch["position_ids"])


def state_type(hidden: Tensor) -> torch.dtype:
    """Of products of these states, and of what lies between most layers."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@torch.compiler.assume_constant_result
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether sequences of any length can be attended to as they lie."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


def bounds_of(cu_seqlens: Tensor, longest: int, n: int, kernel: bool) -> Bounds:
    """Of ``n`` positions; for the ``kernel``, or for laying sequences out."""
    bounds = cu_seqlens.int()
    if kernel:
        return Bounds(bounds, -(-longest // 128) * 128)  # an upper bound will do; few for compilers
    if cu_seqlens.is_cuda:
        longest = -(-longest // 8) * 8  # for the quick kernels of padded attention
    position = torch.arange(n, device=bounds.device)
    sequence = torch.bucketize(position, cu_seqlens, right=True) - 1
    slots = sequence * longest + position - cu_seqlens.index_select(0, sequence)
    lengths = cu_seqlens.diff().clamp(min=1)  # a row of nothing but padding would give NaN
    mask = torch.arange(longest, device=bounds.device) < lengths[:, None, None, None]
    return Bounds(bounds, longest, slots, mask)


class Scores(NamedTuple):
    """What attention's scores are, besides products of queries and keys."""

    window: int | None = None  # how far a position sees to either side
    scale: float | None = None  # of the products; 1 / sqrt(D) by default
    # what is added, for which there is no kernel: of how far keys are behind queries [B or 1, Q, K], and of the queries
    # and keys [B, A, Q or K, D], all laid out -> [B or 1, A, Q, K]
    bias: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


PLAIN = Scores()


def self_attend(states: Tensor, bounds: Bounds, dropout: float = 0.0, scores: Scores = PLAIN) -> Tensor:
    """Each sequence over itself: queries, keys and values ``[T, 3, A, D]`` -> ``[T, A, D]``."""
    scores = without_idle_window(scores, bounds)
    if bounds.slots is None and scores == PLAIN and is_short(states.device, bounds.longest, states.shape[-1]):
        return short_attention(states, bounds.cu_seqlens)
    query, key_value = states.split([1, 2], dim=1)
    return attend(query.squeeze(1), key_value, bounds, bounds, dropout, scores)


def attend(
    query: Tensor,
    key_value: Tensor,
    queries: Bounds,
    keys: Bounds,
    dropout: float = 0.0,
    scores: Scores = PLAIN,
    query_index: Tensor | None = None,
) -> Tensor:
    """Each query ``[Q, A, D]`` over the keys and values ``[T, 2, A, D]`` of its own sequence: ``[Q, A, D]``.

    Args:
        query_index: at which of the T positions queries are ``[Q]``, where they are not all, and scores depend on it.
    """
    scores = without_idle_window(scores, keys)
    in_order = query_index is None  # the kernel counts queries to know what is in the window
    if queries.slots is None and keys.slots is None and scores.bias is None and (scores.window is None or in_order):
        from torch.nn.attention.varlen import varlen_attn

        key, value = key_value.unbind(1)
        bounds: Any = queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest
        window: Any = {} if scores.window is None else {"window_size": (scores.window, scores.window)}
        attended: Any = varlen_attn(query, key, value, *bounds, scale=scores.scale, **window)
        return attended
    queries, keys = with_slots(queries, len(query)), with_slots(keys, len(key_value))
    return attend_laid_out(query, key_value, queries, keys, dropout, scores, query_index)


def attend_laid_out(
    query: Tensor,
    key_value: Tensor,
    queries: Bounds,
    keys: Bounds,
    dropout: float,
    scores: Scores,
    query_index: Tensor | None,
) -> Tensor:
    """`attend` by padded attention, in fp32 on a CPU, whose kernel is slower in half precision."""
    assert queries.slots is not None
    assert keys.slots is not None
    query, key_value, dtype = laid_out(query, queries), laid_out(key_value, keys), query.dtype
    if in_fp32 := query.is_cpu and dtype.itemsize == 2:
        query, key_value = query.float(), key_value.float()
    query, key, value = (states.transpose(1, 2) for states in (query, *key_value.unbind(2)))  # [B, A, L, D]
    mask: Any = keys.mask
    with torch.autocast("cpu", enabled=False) if in_fp32 else nullcontext():
        if scores.window is not None or scores.bias is not None:
            places = torch.arange(keys.longest, device=query.device)
            at = places[None]  # [B or 1, Lq]
            if query_index is not None:
                at = laid_out(keys.slots.index_select(0, query_index) % keys.longest, queries)
            distances = places - at[:, :, None]  # [B or 1, Lq, L]
            mask = mask if scores.window is None else mask & (distances.abs() <= scores.window)[:, None]
            if scores.bias is not None:
                mask = scores.bias(distances, query, key).to(query.dtype).masked_fill(~mask, -torch.inf)
        options: Any = {"attn_mask": mask, "dropout_p": dropout, "scale": scores.scale}
        context = F.scaled_dot_product_attention(query, key, value, **options)
    return take(context.transpose(1, 2).flatten(0, 1).to(dtype), queries.slots)


def without_idle_window(scores: Scores, bounds: Bounds) -> Scores:
    """Without a window where no sequence is longer than what a position sees."""
    idle = scores.window is None or bounds.longest <= scores.window + 1
    return scores._replace(window=None) if idle else scores


def with_slots(bounds: Bounds, n: int) -> Bounds:
    """As they are laid out, of ``n`` positions."""
    return bounds if bounds.slots is not None else bounds_of(bounds.cu_seqlens, bounds.longest, n, kernel=False)


def laid_out(states: Tensor, bounds: Bounds) -> Tensor:
    """``[T, ...]`` -> ``[B, L, ...]``, 0 past the end of a sequence."""
    assert bounds.slots is not None
    n_rows = len(bounds.cu_seqlens) - 1
    return put(states, bounds.slots, n_rows * bounds.longest).unflatten(0, (n_rows, bounds.longest))
