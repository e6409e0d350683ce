"""Pairs of spans of a document (coCondenser, Gao & Callan, ACL 2022): a function of (seed, epoch, document) alone."""

import numpy as np

from condenser.data.hashing import hash_ints

FIRST, SECOND = range(2)  # independent draws for one document


def span_pairs(bounds: np.ndarray, documents: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Two different spans of each document, drawn anew every epoch.

    Args:
        bounds: ``[D + 1]`` first row of each document, as `TokenStore.document_bounds` gives them.
        documents: ``[B]`` numbers of documents.

    Returns:
        rows of the store, ``[B, 2]``.
    """
    first, n_spans = bounds[documents], (bounds[documents + 1] - bounds[documents]).astype(np.uint64)
    assert (n_spans >= 2).all(), "a document with one span has no pair"
    keys = hash_ints(seed, epoch, documents)
    one = hash_ints(keys, FIRST) % n_spans
    other = (one + np.uint64(1) + hash_ints(keys, SECOND) % (n_spans - np.uint64(1))) % n_spans
    return first[:, None] + np.stack([one, other], axis=1).astype(np.int64)
