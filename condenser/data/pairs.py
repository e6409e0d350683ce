"""Pairs of spans of documents (coCondenser, Gao & Callan, ACL 2022), from stores of `prepare --kind spans`.

A sample is a document, and its two sequences are two of its spans: rows as they are stored (whole sentences), or spans
of so many tokens, cut anew each time that the document is visited, from a random place on. Which they are is a function
of (seed, visit, document), so any step can be computed on its own.

Legend: B samples (documents), D documents of all stores, S sequences asked for.
"""

from collections.abc import Sequence

import numpy as np

from condenser.data.hashing import hash_ints
from condenser.data.mixing import Mixture
from condenser.data.store import Rows, TokenStore

FIRST, SECOND, OFFSET, MIDDLE = range(4)  # independent draws for one document
SHORT = 8  # tokens of a span that is cut, at least (or a quarter of what it should have)
TYPICAL = 1 << 16  # documents whose spans stand for all


class Pairs(Mixture):
    """The samples of all epochs over the documents of some stores: spans of ``span_length`` tokens, by default the rows
    that are stored. Raises ValueError as `Mixture`, or for a store of blocks."""

    each = 2

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        span_length: int | None = None,
    ):
        if span_length is not None and span_length < 2:
            raise ValueError(f"data.span_length={span_length} must be at least 2; leave it out for the rows as stored")
        bounds = [store.document_bounds() for store in stores]
        super().__init__(stores, weights, seed=seed, sizes=[len(each) - 1 for each in bounds])
        self.span_length = span_length
        firsts = [each + first for each, first in zip(bounds, self.first_rows, strict=True)]
        self.begins = np.concatenate([each[:-1] for each in firsts])  # [D], in rows of all stores
        self.ends = np.concatenate([each[1:] for each in firsts])
        assert (self.ends - self.begins >= 2).all(), "a document of one span"
        self.n_tokens = np.add.reduceat(self.lengths, self.begins, dtype=np.int64) if len(self.begins) else self.begins

    def typical_lengths(self) -> np.ndarray:
        if self.span_length is None:
            return self.lengths
        some = self.tokens(0, np.arange(min(TYPICAL, len(self))))
        return np.append(some, min(self.span_length, self.n_tokens.max()))

    def tokens(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        documents, visits, ids = self.samples(epoch, numbers)
        keys = hash_ints(self.seed, visits, ids)
        if self.span_length is None:
            return self.lengths[self.stored(documents, keys)].astype(np.int64)
        return cut_pairs(self.n_tokens[documents], self.span_length, keys)[1]

    def sequences(self, epoch: int, numbers: np.ndarray) -> tuple[Rows, np.ndarray, np.ndarray]:
        """The spans with these ``numbers`` ``[S]`` of an epoch; those of sample n are 2n and 2n + 1."""
        documents, visits, ids = self.samples(epoch, numbers // 2)
        keys, which = hash_ints(self.seed, visits, ids), (np.arange(len(numbers)), numbers % 2)
        if self.span_length is None:
            found = self.read(self.stored(documents, keys)[which])
        else:
            begins, lengths = cut_pairs(self.n_tokens[documents], self.span_length, keys)
            found = self.cut(documents, begins[which], lengths[which])
        return found, visits, 2 * ids + numbers % 2

    def stored(self, documents: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Two rows of each document ``[B]``: ``[B, 2]``."""
        return self.begins[documents, None] + two_of(self.ends[documents] - self.begins[documents], keys)

    def cut(self, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> Rows:
        """Of each document ``[S]`` the tokens from ``begins`` ``[S]`` on."""
        sizes = self.ends[documents] - self.begins[documents]  # rows of each document
        first = np.cumsum(sizes) - sizes
        span = np.repeat(np.arange(len(documents)), sizes)  # of each of these rows
        rows = self.begins[documents][span] + np.arange(len(span)) - first[span]
        n_tokens = self.lengths[rows].astype(np.int64)
        before = np.cumsum(n_tokens) - n_tokens
        place = before - before[first][span]  # where each row begins in its document
        is_read = (place < (begins + lengths)[span]) & (place + n_tokens > begins[span])
        found = self.read(rows[is_read])
        n_read = n_tokens[is_read]
        within = np.arange(len(found.tokens)) - np.repeat(np.cumsum(n_read) - n_read - place[is_read], n_read)
        begin_of, length_of = (np.repeat(each[span[is_read]], n_read) for each in (begins, lengths))
        kept = (within >= begin_of) & (within < begin_of + length_of)
        return Rows(found.tokens[kept], found.word_starts[kept], lengths)


def two_of(n: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Two different numbers below each of ``n`` ``[B]``, which are at least 2: ``[B, 2]``."""
    n = n.astype(np.uint64)
    one = hash_ints(keys, FIRST) % n
    other = (one + np.uint64(1) + hash_ints(keys, SECOND) % (n - np.uint64(1))) % n
    return np.stack([one, other], axis=1).astype(np.int64)


def cut_pairs(n_tokens: np.ndarray, length: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents of so many tokens ``[B]`` into spans of ``length``, the first shorter by chance, and take two of
    them: where each begins, and its length, ``[B, 2]``. Where there are not two that are long enough, the document is
    cut once, in its middle third."""
    least = min(SHORT, -(-length // 4))
    offset = 1 + (hash_ints(keys, OFFSET) % np.uint64(length)).astype(np.int64)  # tokens of the first span
    n_spans = 1 + -(-np.maximum(n_tokens - offset, 0) // length)
    first = (offset < least).astype(np.int64)  # the first that is long enough
    last_is_short = n_tokens - offset - (n_spans - 2) * length < least
    n_usable = n_spans - first - last_is_short
    number = first[:, None] + two_of(np.maximum(n_usable, 2), keys)
    begins = np.maximum(offset[:, None] + (number - 1) * length, 0)
    ends = np.minimum(offset[:, None] + number * length, n_tokens[:, None])
    third = n_tokens // 3
    middle = np.maximum(1, third + (hash_ints(keys, MIDDLE) % (third + 1).astype(np.uint64)).astype(np.int64))
    halves = n_usable < 2
    begins[halves] = np.stack([np.zeros_like(middle), middle], axis=1)[halves]
    ends[halves] = np.stack([middle, n_tokens], axis=1)[halves]
    return begins, ends - begins
