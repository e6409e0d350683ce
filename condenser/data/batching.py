"""Which samples make up which micro-batch of which optimizer step: a pure function of (lengths, settings, seed).

An epoch is a random permutation of the samples, cut into steps; ``window`` steps at a time are sorted by length and cut
into micro-batches of equal padded area (rows x longest). Each step gets one micro-batch from each of the
``micro_batches_per_step`` length strata, so all its micro-batches hold little padding and cost alike, while a step as a
whole has the corpus's mix of lengths. Devices share a step's micro-batches out, so the optimisation does not depend on
how many there are. Any step is computed on its own: nothing is replayed to get there.

Remainder policy: every sample is in exactly one step of an epoch; there are ``round(n / batch_size)`` steps (at least
one), and the samples are spread evenly over them.

Memory: the lengths, 2 bytes a sample, and the samples of one window.
"""

import itertools

import numpy as np

from condenser.data.hashing import hash_ints, permuted
from condenser.data.mixing import Mixture

ORDER, SHUFFLE = range(2)  # independent draws for one epoch


class BucketedBatches:
    """The batches of all epochs over samples of these ``lengths``.

    Args:
        lengths: ``[n]`` length of each sample, in tokens; with a mixture, of each row.
        batch_size: samples per optimizer step over all devices, on average.
        micro_batches_per_step: micro-batches of a step over all devices.
        window: steps whose samples are sorted together; larger means less padding and less mixing of lengths.
        seed: seed of the order.
        added: tokens that each sample gets when it is fed (special tokens).
        multiple_of: what padded lengths are rounded up to, so that fewer shapes occur.
        mixture: says which row each sample is, where an epoch is not every row once.

    Raises:
        ValueError: fewer samples, or a smaller ``batch_size``, than there are micro-batches in a step.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        micro_batches_per_step: int,
        window: int = 8,
        seed: int,
        added: int = 0,
        multiple_of: int = 1,
        mixture: Mixture | None = None,
    ):
        self.lengths, self.mixture = np.asarray(lengths), mixture
        self.added, self.multiple_of = added, multiple_of
        self.batch_size, self.window, self.seed = batch_size, window, seed
        self.micro_batches_per_step = micro_batches_per_step
        self.n = len(self.lengths) if mixture is None else len(mixture)
        if min(batch_size, micro_batches_per_step, window, multiple_of) < 1:
            raise ValueError(
                f"batch_size={batch_size}, micro_batches_per_step={micro_batches_per_step}, window={window} and "
                f"multiple_of={multiple_of} must be at least 1"
            )
        if min(batch_size, self.n) < micro_batches_per_step:
            raise ValueError(
                f"micro_batches_per_step={micro_batches_per_step} needs at least as many samples in a step: "
                f"batch_size is {batch_size} and there are {self.n} samples"
            )
        if self.lengths.min() < 1:
            raise ValueError(f"sample {int(self.lengths.argmin())} has length {self.lengths.min()}: nothing to batch")
        self.steps_per_epoch = min(max(1, round(self.n / batch_size)), self.n // micro_batches_per_step)
        self.n_windows = -(-self.steps_per_epoch // window)
        self._cached: tuple[tuple[int, int], list[list[np.ndarray]]] | None = None

    def step(self, i: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """The micro-batches (arrays of sample numbers) of optimizer step ``i`` (counted over epochs) on ``rank``."""
        epoch, step = divmod(i, self.steps_per_epoch)
        window = ((step + 1) * self.n_windows - 1) // self.steps_per_epoch
        return self._window(epoch, window)[step - self._first_step(window)][rank::world_size]

    def _first_step(self, window: int) -> int:
        return window * self.steps_per_epoch // self.n_windows

    def _window(self, epoch: int, window: int) -> list[list[np.ndarray]]:
        """All steps of a window; the last one computed is kept, since steps are asked for in order."""
        if self._cached is None or self._cached[0] != (epoch, window):
            self._cached = (epoch, window), self._compute_window(epoch, window)
        return self._cached[1]

    def _compute_window(self, epoch: int, window: int) -> list[list[np.ndarray]]:
        first, end = self._first_step(window), self._first_step(window + 1)
        n_steps, n = end - first, self.n
        places = np.arange(first * n // self.steps_per_epoch, end * n // self.steps_per_epoch)
        samples = permuted(places, n, self.seed, ORDER, epoch)
        rows = samples if self.mixture is None else self.mixture.samples(epoch, samples).rows
        padded = -(-(self.lengths[rows].astype(np.int64) + self.added) // self.multiple_of) * self.multiple_of
        longest_first = np.argsort(-padded, kind="stable")
        samples = samples[longest_first]
        bounds = equal_area_bounds(padded[longest_first], n_steps * self.micro_batches_per_step)
        micro_batches = [samples[start:stop] for start, stop in itertools.pairwise(bounds)]
        strata = [
            [micro_batches[stratum * n_steps + place] for place in self._shuffled(epoch, window, stratum, n_steps)]
            for stratum in range(self.micro_batches_per_step)
        ]
        return [list(step) for step in zip(*strata, strict=True)]

    def _shuffled(self, epoch: int, window: int, stratum: int, n: int) -> np.ndarray:
        return np.argsort(hash_ints(self.seed, SHUFFLE, epoch, window, stratum, np.arange(n)), kind="stable")


def equal_area_bounds(lengths: np.ndarray, n_parts: int) -> list[int]:
    """Cut descending ``lengths`` into ``n_parts`` runs of equal area (rows x the run's longest).

    Returns the ``n_parts + 1`` bounds. The common area is found by bisection. Filling one run after the other would
    leave to the last whatever the steps between lengths happen to leave, so the bounds are then chosen together.
    """
    smallest, largest = 0.0, float(len(lengths) * lengths[0])
    while largest - smallest > 0.25 * lengths[-1] / n_parts:
        area = (smallest + largest) / 2
        start = last_start(lengths, n_parts, area)
        if (len(lengths) - start) * lengths[min(start, len(lengths) - 1)] > area:
            smallest = area
        else:
            largest = area
    candidates = (
        bounds
        for tolerance, scale in itertools.product((0.25, 0.5, 1, 2, 4, np.inf), (1, 0.97, 1.03, 0.94, 1.06))
        if (bounds := bounds_near(lengths, n_parts, scale * largest, tolerance))
    )
    best, least = [], np.inf
    for bounds in candidates:
        if (worst := inequality(lengths, bounds)) < least:
            best, least = bounds, worst
        if least < 0.8:
            break
    return best


def inequality(lengths: np.ndarray, bounds: list[int]) -> float:
    """How far the area of a run is from the mean at most, in rows of its own or 5 % of the mean, if that is more."""
    longest = lengths[bounds[:-1]]
    areas = np.diff(bounds) * longest
    return float((np.abs(areas - areas.mean()) / np.maximum(0.05 * areas.mean(), longest)).max())


def last_start(lengths: np.ndarray, n_parts: int, area: float) -> int:
    """Where the last run begins if each before it is filled up to ``area``."""
    start = 0.0
    for _ in range(n_parts - 1):
        start += max(1.0, area / lengths[min(int(start), len(lengths) - 1)])
    return int(start)


def bounds_near(lengths: np.ndarray, n_parts: int, area: float, tolerance: float) -> list[int]:
    """Bounds of runs whose areas all differ from ``area`` by at most ``tolerance`` times one row or 5 %, whichever is
    larger; empty if there are none."""
    n, rows = len(lengths), area / lengths
    slack = tolerance * np.maximum(0.05 * rows, 1)
    fewest, most = np.clip(np.ceil(rows - slack), 1, n), np.clip(np.floor(rows + slack), 1, n)
    first_end, last_end = (np.minimum(np.arange(n) + size, n + 1).astype(np.int64) for size in (fewest, most))
    starts = [np.array([0])]  # of each run, all that can be reached
    for _ in range(n_parts):
        here = starts[-1]
        opened = np.bincount(first_end[here], minlength=n + 2) - np.bincount(last_end[here] + 1, minlength=n + 3)[:-1]
        starts.append(np.flatnonzero(opened[:n].cumsum()))
        ends = opened.cumsum()[n] > 0
    if not ends:
        return []
    bounds = [n]
    for here in starts[n_parts - 1 :: -1]:
        fits = here[(first_end[here] <= bounds[-1]) & (bounds[-1] <= last_end[here])]
        bounds.append(int(fits[np.abs((bounds[-1] - fits) * lengths[fits] - area).argmin()]))
    return bounds[::-1]
