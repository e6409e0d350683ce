"""Attention over flat sequences of at most 128 tokens, each of which one program of a GPU holds whole.

The kernels made for long sequences go through them in blocks, and in the backward pass add up what blocks give by
atomic operations. Where a sequence is a single block there is nothing to add up: states are read once, nothing is kept
for the backward pass but the states, and gradients are written once, side by side as the products before want them.

Legend: T tokens, B sequences, A attention heads, D their size.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch for CPUs alone
    triton = None

LONGEST = 128
SIZES = (16, 32, 64)  # of a head
SHARED_MEMORY = 96 * 1024  # bytes that a program needs


@torch.compiler.assume_constant_result
def is_short(device: torch.device, longest: int, head_size: int) -> bool:
    """Whether the kernels take sequences of up to ``longest`` tokens on this device."""
    if triton is None or device.type != "cuda" or longest > LONGEST or head_size not in SIZES:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    available: int = properties.shared_memory_per_block_optin
    return available >= SHARED_MEMORY


@torch.library.custom_op("condenser::short_attention", mutates_args=())
def short_attention(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention of every sequence over itself.

    Args:
        states: queries, keys and values, ``[T, 3, A, D]``, contiguous.
        cu_seqlens: ``[B + 1]`` int32, where sequences begin; T at the end.

    Returns:
        ``[T, A, D]``.
    """
    n, _, n_heads, size = states.shape
    context = states.new_empty(n, n_heads, size)
    attended[grid(states, cu_seqlens)](states, cu_seqlens, context, n_heads, size**-0.5, LONGEST, size, num_warps=8)
    return context


@short_attention.register_fake
def _(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    n, _, n_heads, size = states.shape
    return states.new_empty(n, n_heads, size)


@torch.library.custom_op("condenser::short_attention_backward", mutates_args=())
def short_attention_backward(gradient: Tensor, states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The gradient ``[T, 3, A, D]`` of the states for that of the context ``[T, A, D]``."""
    _, _, n_heads, size = states.shape
    found = torch.empty_like(states)
    arguments = states, cu_seqlens, gradient.contiguous(), found, n_heads, size**-0.5, LONGEST, size
    attended_backward[grid(states, cu_seqlens)](*arguments, num_warps=8)
    return found


@short_attention_backward.register_fake
def _(gradient: Tensor, states: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(states)


def keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return short_attention_backward(gradient, *ctx.saved_tensors), None


short_attention.register_autograd(backward, setup_context=keep)


def grid(states: Tensor, cu_seqlens: Tensor) -> tuple[int, int]:
    """A program for each head of each sequence; those of one sequence come one after the other."""
    return states.shape[2], len(cu_seqlens) - 1


if triton is not None:

    @triton.jit
    def block(states, first, length, which, n_heads, rows: tl.constexpr, size: tl.constexpr):
        """Where queries (0), keys (1) or values (2) of this program's sequence and head are, and which there are."""
        row = tl.arange(0, rows)
        token = (first + row).to(tl.int64)
        places = states + ((token * 3 + which) * n_heads + tl.program_id(0))[:, None] * size + tl.arange(0, size)[None]
        return places, (row < length)[:, None]

    @triton.jit
    def context_block(context, first, length, n_heads, rows: tl.constexpr, size: tl.constexpr):
        row = tl.arange(0, rows)
        token = (first + row).to(tl.int64)
        places = context + (token * n_heads + tl.program_id(0))[:, None] * size + tl.arange(0, size)[None]
        return places, (row < length)[:, None]

    @triton.jit
    def probabilities(query, key, length, scale, rows: tl.constexpr):
        """Of each query over the keys, in fp32: ``[rows, rows]``, 0 past the end."""
        scores = tl.dot(query, tl.trans(key)) * (scale * 1.4426950408889634)
        scores = tl.where((tl.arange(0, rows) < length)[None], scores, float("-inf"))
        powers = tl.exp2(scores - tl.max(scores, 1)[:, None])
        return powers / tl.sum(powers, 1)[:, None]

    @triton.jit
    def attended(states, cu_seqlens, context, n_heads, scale, rows: tl.constexpr, size: tl.constexpr):
        first = tl.load(cu_seqlens + tl.program_id(1))
        length = tl.load(cu_seqlens + tl.program_id(1) + 1) - first
        if length > 0:
            places, there = block(states, first, length, 0, n_heads, rows, size)
            query = tl.load(places, there, 0.0)
            places, there = block(states, first, length, 1, n_heads, rows, size)
            key = tl.load(places, there, 0.0)
            places, there = block(states, first, length, 2, n_heads, rows, size)
            value = tl.load(places, there, 0.0)
            share = probabilities(query, key, length, scale, rows).to(value.dtype)
            places, there = context_block(context, first, length, n_heads, rows, size)
            tl.store(places, tl.dot(share, value).to(value.dtype), there)

    @triton.jit
    def attended_backward(states, cu_seqlens, gradient, found, n_heads, scale, rows: tl.constexpr, size: tl.constexpr):
        first = tl.load(cu_seqlens + tl.program_id(1))
        length = tl.load(cu_seqlens + tl.program_id(1) + 1) - first
        if length > 0:
            places, there = block(states, first, length, 0, n_heads, rows, size)
            query = tl.load(places, there, 0.0)
            places, there = block(states, first, length, 1, n_heads, rows, size)
            key = tl.load(places, there, 0.0)
            places, there = block(states, first, length, 2, n_heads, rows, size)
            value = tl.load(places, there, 0.0)
            places, there = context_block(gradient, first, length, n_heads, rows, size)
            pull = tl.load(places, there, 0.0)
            share = probabilities(query, key, length, scale, rows)
            places, there = block(found, first, length, 2, n_heads, rows, size)
            tl.store(places, tl.dot(tl.trans(share.to(value.dtype)), pull).to(value.dtype), there)
            of_share = tl.dot(pull, tl.trans(value))
            of_scores = share * (of_share - tl.sum(share * of_share, 1)[:, None]) * scale
            of_scores = of_scores.to(value.dtype)
            places, there = block(found, first, length, 0, n_heads, rows, size)
            tl.store(places, tl.dot(of_scores, key).to(value.dtype), there)
            places, there = block(found, first, length, 1, n_heads, rows, size)
            tl.store(places, tl.dot(tl.trans(of_scores), query).to(value.dtype), there)
