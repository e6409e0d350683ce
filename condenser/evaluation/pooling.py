"""How an encoder's token vectors become one: a backbone under several poolings, by sentence-transformers' modules; and
whitening of what comes out.

    cls, mean, max      of the last layer
    mean+max            both, the maximum first: twice the dimensions
    last<k>-cls         mean of the [CLS] vectors of the last k layers
    weighted-layers     weighted mean of the [CLS] vectors of all layers; the weights start equal and are fine-tuned
    attention           mean of the last layer weighted by softmax of a product with one vector, which is fine-tuned

The mean over layers is `WeightedLayerPooling` before CLS pooling, which is the same as the mean of [CLS] vectors. A
module of our own would not load: sentence-transformers 6 refuses foreign classes without ``trust_remote_code``; so an
encoder with attention pooling can be measured, but not saved.

Whitening is an affine map after which the vectors have mean 0 and the identity as covariance (Su et al., "Whitening
Sentence Representations for Better Semantics and Faster Retrieval", 2021). It needs texts but no labels. [CLS] and mean
vectors of masked LMs lie in a narrow cone, where all cosines are alike; this spreads them.
"""

import copy
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from condenser.evaluation.encoders import Encoder, backbone

MODES = {"cls": "cls", "mean": "mean", "max": "max", "mean+max": ("max", "mean")}
LAST = r"last([1-9]\d*)-cls"
RESOLVED = 1e-5  # standard deviation, in lengths of the vectors, below which a direction is mostly fp32's rounding


class AttentionPooling(nn.Module):
    """Weights of the tokens are the softmax of their products with ``attention_query`` ``[H]``: at first all alike."""

    pooling_mode = "attention"

    def __init__(self, size: int):
        super().__init__()
        self.attention_query = nn.Parameter(torch.zeros(size))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens = features["token_embeddings"]  # [B, L, H]
        scores = tokens @ self.attention_query.to(tokens.dtype) / tokens.shape[-1] ** 0.5
        weights = scores.masked_fill(features["attention_mask"] == 0, float("-inf")).softmax(dim=1)
        return features | {"sentence_embedding": (weights.unsqueeze(1) @ tokens).squeeze(1)}

    def get_embedding_dimension(self) -> int:
        return len(self.attention_query)


def with_pooling(encoder: Encoder, name: str) -> Encoder:
    """A copy of the encoder with another pooling; ValueError for an unknown one, for more layers than there are, or an
    encoder of other modules than Transformer, Pooling and Normalize."""
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling

    parts = (Pooling, WeightedLayerPooling, AttentionPooling)
    first, *others = encoder
    if not isinstance(first, Transformer) or not all(isinstance(module, (*parts, Normalize)) for module in others):
        modules = ", ".join(type(module).__name__ for module in encoder)
        raise ValueError(f"another pooling needs an encoder of Transformer, Pooling and Normalize, not of {modules}")
    check_name(name)
    config, last = backbone(encoder).config, re.fullmatch(LAST, name)
    layers = config.num_hidden_layers * getattr(config, "inner_group_num", 1)  # of ALBERT's, each is several
    averaged = int(last[1]) if last else layers * (name == "weighted-layers")  # layers; 0 for none
    if averaged > layers:
        raise ValueError(f"pooling {name!r}: the encoder has {layers} layers")
    twin = copy.deepcopy(encoder)
    transformer, *rest = (module for module in twin if not isinstance(module, parts))
    size: Any = transformer.get_embedding_dimension()  # type: ignore[operator]
    backbone(twin).config.output_hidden_states = averaged > 0  # hands all layers to the module that averages them
    del twin[1:]
    if averaged:
        average = WeightedLayerPooling(size, num_hidden_layers=layers, layer_start=layers + 1 - averaged)
        twin.append(average.requires_grad_(name == "weighted-layers"))
    pooling = AttentionPooling(size) if name == "attention" else Pooling(size, MODES.get(name, "cls"))
    return twin.extend([pooling, *rest]).to(encoder.device)


def check_name(name: str) -> None:
    if name not in (*MODES, "weighted-layers", "attention") and not re.fullmatch(LAST, name):
        known = f"{', '.join(MODES)}, last<k>-cls, weighted-layers and attention"
        raise ValueError(f"no pooling {name!r}: there are {known}")


def fit_whitening(vectors: np.ndarray, dim: int | None = None) -> Any:
    """The map x -> (x - mean) W to the ``dim`` directions of largest variance, as a sentence-transformers module.

    Args:
        vectors: [N, D] of the texts to fit
        dim: by default, and of D, all in which the vectors vary: D, or somewhat less, as LayerNorm's outputs lie in a
            hyperplane and some encoders have constant dimensions

    Raises:
        ValueError: too few vectors, or fewer directions than ``dim``.
    """
    from sentence_transformers.base.modules import Dense

    vectors = np.asarray(vectors, np.float64)
    n, size = vectors.shape
    if dim == size:
        dim = None
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
