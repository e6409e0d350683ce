"""Several token stores read as one, each with a weight.

An epoch holds ``round(weight * rows)`` samples of each store. It goes on through a store where the epoch before it
stopped, so all rows are seen once before any is seen twice, in an order that is drawn anew for each pass. Which row a
sample is, and how often that row was seen before (its *visit*, which its masks depend on), is computed where it is
asked for.

Legend: n samples of an epoch, N rows of all stores, B samples asked for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from condenser.data.hashing import permuted
from condenser.data.store import Rows, TokenStore, joined

PASS = 7  # tells this draw from those of batching.py
STORE_BITS = 40  # a sample id is a row's number in its store; the store's own number stands above these bits


class Samples(NamedTuple):
    """``[B]`` each: the row among those of all stores, how often it was seen before, and the sample's id."""

    rows: np.ndarray
    visits: np.ndarray
    ids: np.ndarray


class Mixture:
    """The samples of all epochs over some stores.

    Args:
        stores: read with the same tokenizer.
        weights: passes over each store in an epoch; 1 for each by default.
        seed: seed of the order of the passes.

    Raises:
        ValueError: a negative weight, or stores of different tokenizers.
    """

    def __init__(self, stores: Sequence[TokenStore], weights: Sequence[float] | None = None, *, seed: int):
        self.stores, self.seed = list(stores), seed
        weights = [1.0] * len(self.stores) if weights is None else weights
        self.sizes = np.array([len(store) for store in self.stores])
        if min(weights) < 0:
            raise ValueError(f"the weights of stores must not be negative: {list(weights)}")
        self.quotas = np.rint(np.array(weights) * self.sizes).astype(np.int64)
        for store in self.stores[1:]:
            if store.manifest["tokenizer"] != self.stores[0].manifest["tokenizer"]:
                raise ValueError(f"{store.folder} and {self.stores[0].folder} were made with different tokenizers")
        alone = len(self.stores) == 1
        self.lengths = stores[0].lengths if alone else np.concatenate([store.lengths for store in self.stores])  # [N]
        self.first_rows = np.cumsum([0, *self.sizes])[:-1]
        self.first_samples = np.cumsum([0, *self.quotas])[:-1]

    def __len__(self) -> int:
        return int(self.quotas.sum())

    def samples(self, epoch: int, numbers: np.ndarray) -> Samples:
        """The samples with these ``numbers`` (0 to n - 1) of an epoch."""
        store = np.searchsorted(self.first_samples, numbers, side="right") - 1
        place = epoch * self.quotas[store] + numbers - self.first_samples[store]
        visits, row = np.divmod(place, self.sizes[store])
        for number in np.flatnonzero(
            self.quotas % np.maximum(self.sizes, 1)
        ):  # whole passes need no order of their own
            for visit in np.unique(visits[store == number]):
                here = (store == number) & (visits == visit)
                row[here] = permuted(row[here], int(self.sizes[number]), self.seed, PASS, int(number), int(visit))
        return Samples(self.first_rows[store] + row, visits, (store << STORE_BITS) | row)

    def read(self, rows: np.ndarray) -> Rows:
        """These rows ``[B]``, as `TokenStore.rows`."""
        if len(self.stores) == 1:
            return self.stores[0].rows(rows)
        store_of = np.searchsorted(self.first_rows, rows, side="right") - 1
        slices: list[Any] = [None] * len(rows)
        for number in np.unique(store_of):
            here = np.flatnonzero(store_of == number)
            found = self.stores[number].slices(rows[here] - self.first_rows[number])
            for place, piece in zip(here.tolist(), found, strict=True):
                slices[place] = piece
        return joined(slices, self.lengths[rows])
