"""Dropout of compiled passes, by a hash, and of a CPU, by 16 random bits.

A compiler draws random numbers within the operations around them, ten rounds of a generator for each, which on a GPU
takes longer than the rest of what a layer norm does; and the backward pass has to read again what was dropped. Here it
is a hash of a position, cheap enough to be computed a second time, under a seed that each module gets for each pass.
On a CPU torch's own takes about twice as long as this, forwards and backwards.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORD = 0xFFFFFFFF  # 32 bits
MULTIPLIERS = 0x7FEB352D, 0x846CA68B - 2**32


class Seeds:
    """Seeds of all dropout modules of a model, drawn anew for each pass by the device's generator."""

    def __init__(self, model: nn.Module):
        self.modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        device = next(model.parameters()).device
        # four for each, of which two are used: compilers want what they read to begin at a multiple of 16 bytes
        self.values = torch.zeros(len(self.modules), 4, dtype=torch.int32, device=device)
        for module, values in zip(self.modules, self.values, strict=True):
            module.seed = values

    def draw(self) -> None:
        self.values.random_()


def drop(states: Tensor, dropout: Any) -> Tensor:
    """Some of the ``states`` become 0, all others larger, as the module ``dropout`` says; there may be none."""
    if dropout is None or not dropout.training:
        return states
    p, seed = dropout.p, getattr(dropout, "seed", None)
    if seed is not None and torch.compiler.is_compiling():
        kept = hashed(seed, states.shape, p)
    elif states.is_cpu and not torch.compiler.is_compiling():
        kept = drawn(states.shape, p)
    else:
        return F.dropout(states, p)  # the module itself may be asked only once by torch's tracker
    return torch.where(kept, states * (1 / (1 - p) if p < 1 else 0.0), 0)


def hashed(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """Which of ``shape`` are not dropped, each with probability ``1 - p``."""
    place = torch.arange(math.prod(shape), dtype=torch.int32, device=seed.device).view(shape)
    number = mixed(mixed(place ^ seed[0]) ^ seed[1])
    return (number >> 7 & 0xFFFFFF) >= round(p * 2**24)


def drawn(shape: torch.Size, p: float) -> Tensor:
    """The same on a CPU, by its generator, of which one draw is enough for four values."""
    n = math.prod(shape)
    number = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n].view(shape)
    return number >= min(round(p * 2**16), 2**16 - 1) - 2**15  # with p of 1, what is left is times 0


def mixed(x: Tensor) -> Tensor:
    """A bijection of int32 whose output bits each depend on all input bits (Wellons' lowbias32); products wrap around,
    shifts bring in zeros. On CPUs in 64 bits, in which nothing wraps: what C++ makes of a signed product that does is
    undefined, and compiled code was seen to differ."""
    if not x.is_cuda:
        wide = x.long() & WORD
        wide = (wide ^ wide >> 16) * MULTIPLIERS[0] & WORD
        wide = (wide ^ wide >> 15) * MULTIPLIERS[1] & WORD
        return (wide ^ wide >> 16).int()
    x = (x ^ (x >> 16 & 0xFFFF)) * MULTIPLIERS[0]
    x = (x ^ (x >> 15 & 0x1FFFF)) * MULTIPLIERS[1]
    return x ^ (x >> 16 & 0xFFFF)
