"""Semantic textual similarity: how an encoder's cosines follow human scores, and how its vectors lie on the sphere.

The similarity is the cosine whatever the encoder searches with, as in SentEval and MTEB, so that numbers compare with
published ones. Alignment and uniformity are those of Wang & Isola, "Understanding Contrastive Representation Learning
through Alignment and Uniformity on the Hypersphere" (2020), taken on STS as in SimCSE; lower is better for both.
"""

from typing import Any

import numpy as np

from condenser.data.hashing import permuted
from condenser.evaluation.encoders import Encoder, encoded
from condenser.evaluation.finetuning import check_size
from condenser.evaluation.pairs import Pairs

POSITIVE = 0.8  # of the range of the scores, from where on a pair counts as positive: 4 on STS's 0 to 5
UNIFORMITY_SENTENCES = 5_000  # compared with each other in 100 MB


def similarity_metrics(encoder: Encoder, pairs: Pairs) -> tuple[dict[str, Any], np.ndarray]:
    """Spearman and Pearson correlation, alignment and uniformity; and each pair's cosine [N].

    The correlations are NaN for an encoder that gives all texts one vector.
    """
    from scipy.stats import pearsonr, spearmanr

    sentences = list(dict.fromkeys(pairs.first + pairs.second))
    vectors = encoded(encoder, sentences).cpu().numpy().astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row = {sentence: number for number, sentence in enumerate(sentences)}
    first, second = (vectors[[row[sentence] for sentence in side]] for side in (pairs.first, pairs.second))
    cosines = (first * second).sum(axis=1)
    lowest, highest = pairs.scores.min(), pairs.scores.max()
    positive = pairs.scores >= lowest + POSITIVE * (highest - lowest)
    metrics = {
        "spearman": float(spearmanr(cosines, pairs.scores).statistic),
        "pearson": float(pearsonr(cosines, pairs.scores).statistic),
        "alignment": float(((first - second)[positive] ** 2).sum(axis=1).mean()),
        "uniformity": uniformity(vectors),
        "pairs": len(pairs.scores),
        "positive_pairs": int(positive.sum()),
    }
    return metrics, cosines


def uniformity(vectors: np.ndarray) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of unit vectors [N, D]; of many, over a fixed sample's."""
    from scipy.spatial.distance import pdist

    n = len(vectors)
    if n > UNIFORMITY_SENTENCES:
        vectors = vectors[permuted(np.arange(UNIFORMITY_SENTENCES), n, 0)]
    return float(np.log(np.exp(-2 * pdist(vectors, "sqeuclidean")).mean()))


def pair_examples(pairs: Pairs, size: int | None, seed: int) -> dict[str, list[Any]]:
    """The columns that sentence-transformers' losses of pairs train on: sentences, and scores scaled to 0 to 1.

    Args:
        size: number of pairs, drawn by ``seed``; of two sizes the smaller one's pairs are among the larger one's
    """
    n = len(pairs.scores)
    check_size(size, n, f"pairs of {pairs.name} to train on")
    chosen = permuted(np.arange(size or n), n, seed)
    lowest, highest = pairs.scores.min(), pairs.scores.max()
    return {
        "sentence1": [pairs.first[i] for i in chosen],
        "sentence2": [pairs.second[i] for i in chosen],
        "score": ((pairs.scores[chosen] - lowest) / (highest - lowest)).tolist(),
    }
