"""Which samples make up which micro-batch of which optimizer step: a pure function of (lengths, settings, seed).

An epoch is a random permutation of the samples. ``window`` steps at a time, its samples are cut into steps of equal
numbers of tokens; a step is a random sample of the corpus, whatever its number of micro-batches, and since its loss is
a mean over its tokens, equal steps weigh every token alike. A step's samples are sorted by length and cut into
micro-batches, again of equal numbers of tokens, so that all cost alike, and rows that attention lays out side by side
are of like length. Devices share a step's micro-batches out, so the optimisation does not depend on how many there are.
Any step is computed on its own: nothing is replayed to get there. A sample is one sequence, or the two spans of a
document: these are in the same step, and anywhere in it.

Remainder policy: every sample is in exactly one step of an epoch; there are ``round(n / batch_size)`` steps (at least
one), and the samples are spread evenly over them.

Memory: the lengths, 2 bytes a sample, and the samples of one window.
"""

import itertools
from typing import Any

import numpy as np

from condenser.data.hashing import permuted
from condenser.data.mixing import Mixture
from condenser.data.pairs import Pairs

ORDER = 0  # tells this draw from those of mixing.py


class BucketedBatches:
    """The batches of all epochs over samples of these ``lengths``.

    Args:
        lengths: ``[n]`` length of each sample, in tokens; or what knows them by epoch, with several sequences a sample.
        batch_size: sequences per optimizer step over all devices, on average.
        micro_batches_per_step: micro-batches of a step over all devices.
        window: steps whose samples are shared out over them together; more makes their numbers of tokens more equal.
        seed: seed of the order.
        added: tokens that each sequence gets when it is fed (special tokens).

    Raises:
        ValueError: fewer sequences, or a smaller ``batch_size``, than there are micro-batches in a step.
    """

    def __init__(
        self,
        lengths: np.ndarray | Mixture | Pairs,
        *,
        batch_size: int,
        micro_batches_per_step: int,
        window: int = 8,
        seed: int,
        added: int = 0,
    ):
        self.samples = OneEach(np.asarray(lengths)) if isinstance(lengths, np.ndarray | list) else lengths
        self.batch_size, self.window, self.seed, self.added = batch_size, window, seed, added
        self.micro_batches_per_step = micro_batches_per_step
        self.n = len(self.samples)
        if min(batch_size, micro_batches_per_step, window) < 1:
            raise ValueError(
                f"batch_size={batch_size}, micro_batches_per_step={micro_batches_per_step} and window={window} "
                "must be at least 1"
            )
        each = self.samples.each
        if min(batch_size, self.n * each) < micro_batches_per_step:
            raise ValueError(
                f"micro_batches_per_step={micro_batches_per_step} needs at least as many sequences in a step: "
                f"batch_size is {batch_size} and there are {self.n * each} sequences"
            )
        # samples of a step: two documents, where there are as many
        self.least = least = max(min(each, self.n), -(-micro_batches_per_step // each))
        self.steps_per_epoch = min(max(1, round(self.n * each / batch_size)), self.n // least)
        self.n_windows = -(-self.steps_per_epoch // window)
        self._cached: tuple[Any, list[list[np.ndarray]]] = None, []  # the last window, as steps are asked for in order

    def step(self, i: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """The micro-batches of optimizer step ``i`` (counted over epochs) on ``rank``: arrays of sequence numbers, of
        which those of sample n begin at ``n * each``."""
        epoch, step = divmod(i, self.steps_per_epoch)
        window = ((step + 1) * self.n_windows - 1) // self.steps_per_epoch  # the last whose `first_step` is <= step
        if self._cached[0] != (epoch, window):
            self._cached = (epoch, window), self.steps_of_window(epoch, window)
        return self._cached[1][step - self.first_step(window)][rank::world_size]

    def first_step(self, window: int) -> int:
        return window * self.steps_per_epoch // self.n_windows

    def steps_of_window(self, epoch: int, window: int) -> list[list[np.ndarray]]:
        first, end = self.first_step(window), self.first_step(window + 1)
        places = np.arange(first * self.n // self.steps_per_epoch, end * self.n // self.steps_per_epoch)
        numbers = permuted(places, self.n, self.seed, ORDER, epoch)
        tokens = self.samples.tokens(epoch, numbers) + self.added  # [n, each]
        each = tokens.shape[1]
        numbers = numbers[:, None] * each + np.arange(each)
        steps = []
        for start, stop in itertools.pairwise(equal_bounds(tokens.sum(1), end - first, self.least)):
            sequences, sizes = numbers[start:stop].ravel(), tokens[start:stop].ravel()
            longest_first = np.argsort(-sizes, kind="stable")
            bounds = equal_bounds(sizes[longest_first], self.micro_batches_per_step)
            steps.append([sequences[longest_first[a:b]] for a, b in itertools.pairwise(bounds)])
        return steps


class OneEach:
    """Samples of one sequence each, the same in every epoch."""

    each = 1

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths
        if lengths.min() < 1:
            raise ValueError(f"sample {int(lengths.argmin())} has length {lengths.min()}: nothing to batch")

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        return self.lengths[numbers, None].astype(np.int64)


def equal_bounds(tokens: np.ndarray, n_parts: int, least: int = 1) -> list[int]:
    """Cut samples of so many ``tokens`` each, in order, into ``n_parts`` runs of equal numbers of tokens, as far as
    whole samples allow, and of at least ``least`` samples: the ``n_parts + 1`` bounds."""
    ends = tokens.cumsum()
    wanted = ends[-1] * np.arange(1, n_parts) / n_parts
    cuts = np.searchsorted(ends - tokens / 2, wanted)  # a sample belongs where its middle is
    fewest = least * np.arange(1, n_parts)
    spare = np.maximum.accumulate(np.clip(cuts - fewest, 0, len(tokens) - least * n_parts))
    return [0, *(spare + fewest).tolist(), len(tokens)]
