"""More positions than a backbone was trained with.

Where positions are embedded, the new ones are made of the trained p, of which there are n (Legend: E their width):

    hierarchical   p[i * n + j] = a * u[i] + (1 - a) * u[j] with u = (p - a * p[0]) / (1 - a) and a = 0.4 (Su 2020):
                   the first n are what they were, and up to n * n differ from each other
    interpolated   m positions at equal distances between the first and the last of the trained ones
    copied         p[k % n]

Families that turn queries and keys, or know distances alone, have nothing to extend but the number in their
configuration.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

from condenser.models.backbones.base import backbone_of, longest_text

Extension = Literal["hierarchical", "interpolated", "copied"]
SHARE = 0.4  # a


def with_positions(lm: PreTrainedModel, n: int, extension: Extension = "hierarchical") -> PreTrainedModel:
    """A masked LM of the same weights that takes texts of ``n`` tokens, special ones included.

    Raises:
        ValueError: fewer than it takes already, or more than can be made of its positions.
    """
    longest, config = longest_text(lm.config), copy.deepcopy(lm.config)
    if longest is None or n < longest:
        raise ValueError(f"max_positions={n}: the backbone takes {longest or 'any number of'} tokens already")
    first = backbone_of(lm).first_position(config)
    if getattr(config, "max_relative_positions", 1) < 1:  # DeBERTa takes the number of positions in its place
        config.max_relative_positions = config.max_position_embeddings
    config.max_position_embeddings = n + first
    larger = AutoModelForMaskedLM.from_config(config, dtype=next(lm.parameters()).dtype, trust_remote_code=False)
    state = lm.state_dict()
    for name, weight in larger.state_dict().items():
        if weight.shape != (old := state[name]).shape:  # of positions alone
            state[name] = torch.cat([old[:first], extended(old[first:], n, extension)])
    larger.load_state_dict(state)
    larger.tie_weights()
    return larger


def extended(positions: Tensor, n: int, extension: Extension) -> Tensor:
    """``[n, E]`` of trained ``positions`` ``[trained, E]``.

    Raises:
        ValueError: more than there are pairs of them, if it is to be hierarchical.
    """
    trained = len(positions)
    if extension == "copied":
        return positions[torch.arange(n) % trained]
    if extension == "interpolated":
        return F.interpolate(positions.T[None], n, mode="linear", align_corners=True)[0].T
    if extension != "hierarchical":
        raise ValueError(f"position_extension={extension!r} must be hierarchical, interpolated or copied")
    if n > trained**2:
        raise ValueError(f"max_positions={n}: of {trained} trained positions at most {trained**2} can be made")
    parts = (positions - SHARE * positions[0]) / (1 - SHARE)
    number = torch.arange(n)
    new = SHARE * parts[number // trained] + (1 - SHARE) * parts[number % trained]
    new[:trained] = positions  # to the bit
    return new
