"""A token store in memory whose row lengths are those of real text: for measuring without preparing anything."""

import numpy as np

from condenser.data.collate import Vocabulary
from condenser.data.hashing import hash_ints, permuted
from condenser.data.store import Rows

# Lengths of the rows of a Wikipedia store (good articles of 2019, --max-length 128), per thousand in sixteen equal bins
LENGTHS_OF_REAL_ROWS = (1, 2, 7, 13, 15, 16, 16, 17, 20, 29, 44, 74, 118, 175, 215, 238)
VOCABULARY = Vocabulary(cls_id=101, sep_id=102, pad_id=0, mask_id=103, random_ids=np.arange(1000, 30522))


class SyntheticStore:
    """Reads like a split of a `TokenStore`: ``n`` rows of up to ``max_length`` tokens, special tokens included. Tokens
    are hashes of (row, position); every eleventh id goes on with a word, as in English WordPiece."""

    def __init__(self, n: int, max_length: int = 128):
        quantile = permuted(np.arange(n), n, 1) / n * sum(LENGTHS_OF_REAL_ROWS)
        ends = np.append(0, np.cumsum(LENGTHS_OF_REAL_ROWS))
        longest = np.interp(quantile, ends, np.linspace(2, max_length - 2, len(ends)))
        self.lengths = np.ceil(longest).astype(np.uint16)

    def __len__(self) -> int:
        return len(self.lengths)

    def document_bounds(self) -> np.ndarray:
        """Two rows make up a document."""
        return np.arange(0, len(self) + 1, 2)

    def rows(self, index: np.ndarray) -> Rows:
        """As `TokenStore.rows`."""
        lengths = self.lengths[index].astype(np.int64)
        positions = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        drawn = hash_ints(np.repeat(index, lengths), positions) % np.uint64(len(VOCABULARY.random_ids))
        tokens = VOCABULARY.random_ids[drawn]
        return Rows(tokens, tokens % 11 != 0, lengths)
