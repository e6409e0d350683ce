"""What depends on the device: how passes are computed, and how large they may be."""

import os
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from condenser.models.backbones.base import longest_text
from condenser.models.flops import affordable_tokens
from condenser.models.objective import Objective


def compiled_and_replayed(
    trainer: Any, compile: bool | None, cuda_graphs: bool | None, recomputed: bool
) -> tuple[bool, bool]:
    """Whether passes are compiled, and whether they are replayed as CUDA graphs; where it is left open (None), wherever
    it can be.

    Args:
        recomputed: by gradient checkpointing, which replays do not allow.

    Raises:
        ValueError: it cannot be.
    """
    device, is_sharded = trainer.strategy.root_device, isinstance(trainer.strategy, ModelParallelStrategy)
    on_gpu = device.type == "cuda"
    if compile and is_sharded:
        raise ValueError("model.compile: sharded weights are gathered layer by layer, between compiled functions")
    able = on_gpu and torch.cuda.get_device_capability(device) >= (7, 0)  # for which there is a compiler
    compiled = (able and not is_sharded) if compile is None else compile
    possible = on_gpu and trainer.world_size == 1 and compiled and not recomputed
    if cuda_graphs and not possible:
        raise ValueError("model.cuda_graphs needs one GPU, model.compile, and no model.gradient_checkpointing")
    return compiled, possible if cuda_graphs is None else cuda_graphs


def check_rows(model: Objective, longest_row: int) -> None:
    """Raises ValueError for rows of more tokens than the backbone takes."""
    longest = longest_text(model.lm.config)
    if longest and longest_row > longest:
        raise ValueError(
            f"rows of up to {longest_row} tokens, special ones among them, and a backbone that takes {longest}: "
            "prepare a store with a smaller --max-length, or give the model more positions"
        )


def tokens_that_fit(model: Objective, device: torch.device, mask_probability: float) -> int:
    """Tokens of a pass on this GPU."""
    memory, scored = torch.cuda.get_device_properties(device).total_memory, model.scored_share(mask_probability)
    return affordable_tokens(model.lm.config, model.n_layers, memory, model.gradient_checkpointing, scored)


def keep_few_kernels() -> None:
    """In half precision on CPUs oneDNN and torch each keep the kernels of 1,024 shapes, of some MB each: those of a few
    passes will do."""
    for setting in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(setting, "256")
