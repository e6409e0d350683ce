"""Several token stores read as one, each with a weight.

An epoch holds ``round(weight * rows)`` samples of each store. It goes on through a store where the epoch before it
stopped, so all rows are seen once before any is seen twice, in an order that is drawn anew for each pass. Everything
is computed where it is asked for.

    sample   what is fed once; its number is its place in its epoch, from 0
    row      what a sample reads; its number counts the rows of all stores, one store after the other
    visit    how often the row was read before, over all epochs: the epoch itself, for a single store of weight 1
    id       of a row: which of the stores it is of, and its number there, whatever the weights. Masks are drawn by
             (visit, id)

Legend: n samples of an epoch, N rows of all stores, B samples asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from condenser.data.hashing import permuted
from condenser.data.store import Rows, TokenStore, read_rows

PASS = 7  # tells this draw from those of batching.py
STORE_BITS = 40  # an id is a row's number in its store; the store's own number stands above these bits


class Samples(NamedTuple):
    """``[B]`` each: numbers of rows (of `Pairs`: of documents), their visits, and their ids."""

    rows: np.ndarray
    visits: np.ndarray
    ids: np.ndarray


class Mixture:
    """The samples of all epochs over some stores of one tokenizer, of ``sizes`` samples each, by default its rows. The
    ``weights``, 1 by default, are the passes over each in an epoch; ValueError if one is negative."""

    each = 1  # sequences of a sample

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        sizes: Sequence[int] | None = None,
    ):
        self.stores, self.seed = list(stores), seed
        weights = [1.0] * len(self.stores) if weights is None else weights
        self.sizes = np.array([len(store) for store in self.stores] if sizes is None else sizes)
        if not all(0 <= weight <= 1e6 for weight in weights):
            raise ValueError(f"the weights of stores must be numbers from 0 to 1,000,000: {list(weights)}")
        self.quotas = np.rint(np.array(weights) * self.sizes).astype(np.int64)
        alone = len(self.stores) == 1
        self.lengths = stores[0].lengths if alone else np.concatenate([store.lengths for store in self.stores])  # [N]
        self.first_rows = np.cumsum([0, *map(len, self.stores)])[:-1]
        self.first_items = np.cumsum([0, *self.sizes])[:-1]
        self.first_samples = np.cumsum([0, *self.quotas])[:-1]

    def __len__(self) -> int:
        return int(self.quotas.sum())

    def typical_lengths(self) -> np.ndarray:
        """Tokens of sequences that stand for all, the longest among them."""
        return self.lengths

    def tokens(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        """Of the sequences of samples with these ``numbers`` ``[B]`` of an epoch: ``[B, each]``."""
        return self.lengths[self.samples(epoch, numbers).rows, None].astype(np.int64)

    def sequences(self, epoch: int, numbers: np.ndarray) -> tuple[Rows, np.ndarray, np.ndarray]:
        """The sequences with these ``numbers`` ``[B]`` of an epoch: tokens, visits ``[B]``, ids ``[B]``."""
        rows, visits, ids = self.samples(epoch, numbers)
        return self.read(rows), visits, ids

    def samples(self, epoch: int, numbers: np.ndarray) -> Samples:
        """The samples with these ``numbers`` (0 to n - 1) of an epoch."""
        store = np.searchsorted(self.first_samples, numbers, side="right") - 1
        earlier = epoch * self.quotas[store] + numbers - self.first_samples[store]  # samples of the store
        visits, row = np.divmod(earlier, self.sizes[store])  # numbered in its store
        for mixed in np.flatnonzero(self.quotas % np.maximum(self.sizes, 1)):  # whole passes need no order of their own
            for visit in np.unique(visits[store == mixed]):
                here = (store == mixed) & (visits == visit)
                row[here] = permuted(row[here], int(self.sizes[mixed]), self.seed, PASS, int(mixed), int(visit))
        return Samples(self.first_items[store] + row, visits, (store << STORE_BITS) | row)

    def read(self, rows: np.ndarray) -> Rows:
        """The rows with these numbers ``[B]``, as `TokenStore.rows`."""
        if len(self.stores) == 1:
            return self.stores[0].rows(rows)
        shards = [shard for store in self.stores for shard in store.shards]
        in_order = zip(self.first_rows, self.stores, strict=True)
        return read_rows(shards, np.concatenate([first + store.first_rows for first, store in in_order]), rows)
