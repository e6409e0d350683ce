"""Cross-entropy over a large vocabulary, with and without all logits in memory, and over pairs of vectors.

Legend: M masked tokens, N vectors of spans (siblings at 2i and 2i + 1), H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSED_AVAILABLE = hasattr(F, "linear_cross_entropy")  # torch 2.13
IGNORED = -100
ROWS_AT_ONCE = 2048  # of logits, where they are not all kept; with fewer a GPU waits for the host
MULTIPLE = 64  # GPUs multiply matrices whose sizes are no multiple of 8 by slower kernels; BERT's 30,522 is none


def token_losses(
    hidden: Tensor, decoder: nn.Linear, targets: Tensor, fused: bool = False, score: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropies in fp32 of ``hidden`` ``[M, H]`` with ``targets`` ``[M]``, 0 where these are -100.

    Args:
        fused: compute the logits ``[M, V]`` in parts and keep none of them: less memory, the same gradients. Losses are
            then rounded to the precision of the logits (bf16 under autocast), and more than one product is computed.
        score: say too whether each target has the largest logit.

    Returns:
        losses ``[M]``; right predictions ``[M]`` bool, or None.

    Raises:
        ValueError: ``fused`` with a torch that has no ``linear_cross_entropy``.
    """
    if fused and len(targets):
        correct = predicted_right(hidden, decoder, targets) if score else None
        return fused_losses(hidden, decoder, targets), correct
    logits = logits_of(hidden, decoder)
    losses = F.cross_entropy(at_least_fp32(logits), targets, reduction="none", ignore_index=IGNORED)
    return losses, logits.detach().argmax(-1) == targets if score else None


def logits_of(hidden: Tensor, decoder: nn.Linear) -> Tensor:
    """``[M, V]``, with some columns that have no probability where a GPU is quicker with them."""
    weight, bias = weight_and_bias(decoder)
    if hidden.is_cuda and (left := -len(bias) % MULTIPLE):
        weight, bias = F.pad(weight, (0, 0, 0, left)), F.pad(bias, (0, left), value=-1e4)  # no probability in fp32
    return F.linear(hidden, weight, bias)


def weight_and_bias(decoder: nn.Linear) -> tuple[Tensor, Tensor]:
    return decoder.weight, decoder.weight.new_zeros(len(decoder.weight)) if decoder.bias is None else decoder.bias


def at_least_fp32(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def fused_losses(hidden: Tensor, decoder: nn.Linear, targets: Tensor) -> Tensor:
    if not FUSED_AVAILABLE:
        raise ValueError("fused_loss needs torch 2.13 or newer; leave the setting out to use plain logits")
    device = hidden.device.type
    weight, bias = weight_and_bias(decoder)
    if torch.is_autocast_enabled(device):  # which the function does not know of
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(ROWS_AT_ONCE, len(targets)))
    losses = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none", options=options)
    return losses.float()


@torch.no_grad()
def predicted_right(hidden: Tensor, decoder: nn.Linear, targets: Tensor) -> Tensor:
    """Whether each of ``targets`` ``[M]`` has the largest logit, with some rows of logits at a time: ``[M]``."""
    parts = zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([decoder(part).argmax(-1) == wanted for part, wanted in parts])


def pair_scores(vectors: Tensor, cosine: bool = False) -> Tensor:
    """Dot products in fp32 of all pairs of ``[N, H]``: ``[N, N]``, -1e30 with itself (-inf would make the
    gradient of a learned temperature NaN)."""
    with torch.autocast(vectors.device.type, enabled=False):
        vectors = at_least_fp32(vectors)
        vectors = F.normalize(vectors, dim=-1) if cosine else vectors
        own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        return (vectors @ vectors.T).masked_fill(own, -1e30)


def pair_losses(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row ``[N, N]`` the cross-entropy against its sibling, and whether that has the highest score: ``[N]``."""
    siblings = sibling_of(scores)
    return F.cross_entropy(scores, siblings, reduction="none"), scores.detach().argmax(-1) == siblings


def sibling_of(rows: Tensor) -> Tensor:
    """``[N]``: 1, 0, 3, 2, ..."""
    return torch.arange(len(rows), device=rows.device) ^ 1


@torch.no_grad()
def pair_measures(vectors: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Means over vectors ``[N, H]``: the reciprocal rank of the sibling by ``scores`` ``[N, N]``, and of the vectors'
    directions alignment (mean squared distance of siblings) and uniformity (log of the mean Gaussian potential of all
    pairs); lower is better for these two (Wang & Isola, ICML 2020)."""
    siblings = sibling_of(scores)
    own = scores.gather(1, siblings[:, None])
    rank = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2  # half of the ties are before it
    distances = 2 - 2 * pair_scores(vectors, cosine=True)  # squared, inf to itself
    n = len(vectors)
    return {
        "contrast_mrr": (1 / rank).mean(),
        "alignment": distances.gather(1, siblings[:, None]).mean(),
        "uniformity": ((-2 * distances).exp().sum() / (n * (n - 1))).log(),
    }
