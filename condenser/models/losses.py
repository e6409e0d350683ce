"""Cross-entropy over a large vocabulary, with and without all logits in memory.

Legend: M masked tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSED_AVAILABLE = hasattr(F, "linear_cross_entropy")  # torch 2.13


def token_losses(hidden: Tensor, decoder: nn.Linear, targets: Tensor, fused: bool = False) -> Tensor:
    """Cross-entropies ``[M]`` in fp32 of ``hidden`` ``[M, H]`` with ``targets`` ``[M]``.

    Args:
        fused: compute the logits ``[M, V]`` in parts and keep none of them: less memory, the same gradients. Losses are
            then rounded to the precision of the logits (bf16 under autocast).

    Raises:
        ValueError: ``fused`` with a torch that has no ``linear_cross_entropy``.
    """
    if not fused:
        return F.cross_entropy(decoder(hidden).float(), targets, reduction="none")
    if not FUSED_AVAILABLE:
        raise ValueError("fused_loss needs torch 2.13 or newer; leave the setting out to use plain logits")
    device = hidden.device.type
    weight: Tensor = decoder.weight
    bias: Tensor = decoder.bias
    if torch.is_autocast_enabled(device):  # which the function does not know of
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none", options=options)
    return losses.float()


@torch.no_grad()
def predicted_right(hidden: Tensor, decoder: nn.Linear, targets: Tensor, chunk: int = 2048) -> Tensor:
    """Whether each of ``targets`` ``[M]`` has the largest logit, with ``chunk`` rows of logits at a time: ``[M]``."""
    return torch.cat(
        [
            decoder(part).argmax(-1) == wanted
            for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
    )
