"""Few shapes of passes, for compilers, and few sizes of products, for CPUs: dummy sequences fill passes up.

They stand at the end, nothing of them is scored, and they are counted nowhere.

Legend: B sequences, T tokens, M masked tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from condenser.data.collate import Fields
from condenser.data.masking import IGNORED
from condenser.data.store import SPECIAL_TOKENS


class Shape(NamedTuple):
    tokens: int  # T
    sequences: int | None  # B; as many as there come to be
    masked: int  # M
    queries: int  # Q
    longest: int  # at least max_seqlen
    most_read: int  # at least max_query


@dataclass(frozen=True)
class Shapes:
    """The few shapes that passes are filled up to, for compilers: T grows in steps of at most 1/32 (or of two
    sequences, by which small passes differ), and all else goes with it, by what the corpus holds of it on average."""

    tokens: float  # of a sequence on average, special ones included
    masked: float  # of these to be predicted
    longest: int  # tokens of the longest sequence

    @classmethod
    def of(cls, lengths: np.ndarray, probability: float) -> "Shapes":
        """Of samples of these ``lengths``, without special tokens."""
        counts = np.bincount(lengths)
        values = np.arange(len(counts))
        masked = np.maximum(1, np.round(probability * values))
        tokens, masked = ((counts * of_each).sum() / counts.sum() for of_each in (values + SPECIAL_TOKENS, masked))
        return cls(float(tokens), float(masked), up(len(counts) - 1 + SPECIAL_TOKENS, 8))

    def fitting(self, fields: Fields) -> Shape:
        """The smallest that holds a pass and the dummy sequences which fill it up."""
        n_tokens = fields["n_tokens"]
        while True:
            n_tokens = up(n_tokens + 1, max((1 << n_tokens.bit_length()) >> 6, 2 * self.longest))
            n = n_tokens / self.tokens  # sequences, on average
            n_sequences = up(1.125 * n + 4 * n**0.5 + 8, 32)
            n_masked = up(1.01 * self.masked * n + 2 * n**0.5 + 8, 64)
            shape = Shape(n_tokens, n_sequences, n_masked, n_sequences + n_masked, self.longest, self.longest)
            fits = fields["n_masked"] <= n_masked and fields["n_sequences"] + n_dummies(fields, shape) <= n_sequences
            if fits and fields["n_tokens"] + n_dummies(fields, shape) <= n_tokens:
                return shape


def rounded(fields: Fields) -> Shape:
    """Of about a pass's own size, so that products have few numbers of rows: in half precision a CPU makes the kernel
    of each anew, which takes it 5 to 15 ms."""
    n_tokens, n_queries, n_masked = (len(fields[name]) for name in ("input_ids", "query_index", "masked_index"))
    tokens, queries = one_of_few(n_tokens + 1), one_of_few(n_queries + 1)
    return Shape(tokens, None, one_of_few(n_masked), queries, fields["max_seqlen"], fields["max_query"])


def one_of_few(n: int) -> int:
    """``n`` or more: by at most 1/16, or 15."""
    return up(n, max((1 << n.bit_length()) >> 5, 16))


def up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple


def n_dummies(fields: Fields, shape: Shape) -> int:
    """Dummy sequences that have tokens: none longer, or with more queries, than the ``shape`` has them."""
    n_tokens, n_queries = shape.tokens - fields["n_tokens"], shape.queries - len(fields["query_index"])
    return max(1, -(-n_tokens // shape.longest), -(-n_queries // shape.most_read))


def filled(fields: Fields, shape: Shape) -> Fields:
    """A pass filled up to a shape by dummy sequences: first some without tokens, so that each of them begins at a token
    that there is, then some that share out the tokens and queries which are left."""
    n_tokens, n_queries, n = fields["n_tokens"], len(fields["query_index"]), n_dummies(fields, shape)
    n_empty = 0 if shape.sequences is None else shape.sequences - fields["n_sequences"] - n
    lengths, n_read = evenly(shape.tokens - n_tokens, n), evenly(shape.queries - n_queries, n)
    ends = n_tokens + lengths.cumsum()
    n_masked = shape.masked - fields["n_masked"]
    more = {
        "input_ids": np.zeros(ends[-1] - n_tokens, np.int64),
        "position_ids": np.arange(n_tokens, ends[-1]) - np.repeat(ends - lengths, lengths),
        "cu_seqlens": np.append(np.full(n_empty, n_tokens), ends),
        "masked_index": np.full(n_masked, shape.tokens - 1),
        "labels": np.full(n_masked, IGNORED),
        "query_index": np.repeat(ends - lengths, n_read),
        "cu_seqlens_query": np.append(np.full(n_empty, n_queries), n_queries + n_read.cumsum()),
        "masked_slot": np.full(n_masked, shape.queries - 1),
        "original_ids": np.full(ends[-1] - n_tokens, IGNORED),
        "keys": np.zeros(n_empty + n, np.int64),
        "real": np.zeros(n_empty + n, np.int64),
        "slots": np.full(n_empty + n, fields.get("n_slots", 0)),  # past the step's
    }
    more = {name: values for name, values in more.items() if name in fields}
    arrays = {name: np.concatenate([fields[name], values]) for name, values in more.items()}
    return {**fields, **arrays, "max_seqlen": shape.longest, "max_query": shape.most_read}


def evenly(n: int, n_parts: int) -> np.ndarray:
    return np.diff(np.arange(n_parts + 1) * n // n_parts)
