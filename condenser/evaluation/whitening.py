"""Whitening: an affine map after which an encoder's vectors have mean 0 and the identity as covariance.

Su et al., "Whitening Sentence Representations for Better Semantics and Faster Retrieval" (2021). It needs texts but no
labels. [CLS] and mean vectors of masked LMs lie in a narrow cone, where all cosines are alike; this spreads them.
"""

import copy
from typing import Any

import numpy as np
import torch

from condenser.evaluation.encoders import Encoder

RESOLVED = 1e-5  # standard deviation, in lengths of the vectors, below which a direction is mostly fp32's rounding


def fit_whitening(vectors: np.ndarray, dim: int | None = None) -> Any:
    """The map x -> (x - mean) W to the ``dim`` directions of largest variance, as a sentence-transformers module.

    Args:
        vectors: [N, D] of the texts to fit
        dim: by default, all in which the vectors vary: D, or somewhat less, as LayerNorm's outputs lie in a hyperplane
            and some encoders have constant dimensions

    Raises:
        ValueError: too few vectors, or fewer directions than ``dim``.
    """
    from sentence_transformers.base.modules import Dense

    vectors = np.asarray(vectors, np.float64)
    n, size = vectors.shape
    if dim is not None and not 1 <= dim <= size:
        raise ValueError(f"whitening to {dim} dimensions: the encoder's vectors have {size}")
    if n <= (dim or size):
        raise ValueError(
            f"whitening to {dim or size} dimensions needs more than so many texts (several times), not {n}"
        )
    mean = vectors.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(vectors, rowvar=False, ddof=1))  # ascending
    rank = int((variances > RESOLVED**2 * (vectors**2).sum(axis=1).mean()).sum())
    kept = rank if dim is None else dim
    if not 1 <= kept <= rank:
        raise ValueError(f"whitening to {kept} dimensions: the vectors of the {n} texts vary in {rank} only")
    scaled = directions[:, ::-1][:, :kept] / np.sqrt(variances[::-1][:kept])  # [D, kept]
    weight = torch.from_numpy(scaled.T.copy()).float()
    bias = -weight.double() @ torch.from_numpy(mean)  # of the rounded weight: means may be large beside variances
    return Dense(size, kept, activation_function=None, init_weight=weight, init_bias=bias.float())


def whitened(encoder: Encoder, vectors: np.ndarray, dim: int | None = None) -> Encoder:
    """A copy of the encoder that whitens its vectors, fitted on those of some texts (several times as many as
    dimensions)."""
    return copy.deepcopy(encoder).append(fit_whitening(vectors, dim)).to(encoder.device)
