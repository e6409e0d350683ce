"""The passes of each optimizer step of one rank, and the loader that gives them in order.

What they hold is a function of the step's number, so the loader begins anywhere, and its workers need not know of each
other.
"""

import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from condenser.data.batching import BucketedBatches
from condenser.data.collate import Fields, Masking, StepBatch, Vocabulary, collate
from condenser.data.mixing import Mixture
from condenser.data.shapes import Shapes, filled, rounded


class Steps(Dataset):
    """Item i: the passes of optimizer step i on this rank.

    Args:
        device: rank and world size.
        tokens_per_pass: as many micro-batches as have so many tokens on average, and at least one, make up a pass.
        few_shapes: fill passes up to one of few shapes.
        few_sizes: fill passes up a little, so that products have few numbers of rows.
        extras: see `collate`.
    """

    def __init__(
        self,
        mixture: Mixture,
        batches: BucketedBatches,
        vocabulary: Vocabulary,
        masking: Masking,
        device: tuple[int, int] = (0, 1),
        tokens_per_pass: int = 1,
        few_shapes: bool = False,
        few_sizes: bool = False,
        extras: tuple[str, ...] = (),
    ):
        self.extras, self.n_repeated = extras, 0  # the first so many steps again and again, where it is not 0
        self.n_everywhere = 0  # passes of each device at least; those beyond its own are ``again``, not to be counted
        self.mixture, self.batches, self.vocabulary, self.masking = mixture, batches, vocabulary, masking
        self.device = device
        shapes = Shapes.of(mixture.typical_lengths(), masking.probability)
        self.shapes, self.few_sizes = shapes if few_shapes else None, few_sizes
        n_sequences = batches.n * mixture.each / batches.steps_per_epoch  # of a step
        micro_batch = shapes.tokens * n_sequences / batches.micro_batches_per_step  # tokens
        n_micro_batches = -(-batches.micro_batches_per_step // device[1])
        self.n_passes = -(-n_micro_batches // max(1, int(tokens_per_pass / micro_batch)))

    def __getitem__(self, step: int) -> StepBatch:
        rank, world_size = self.device
        drawn = step % self.n_repeated if self.n_repeated else step
        epoch = drawn // self.batches.steps_per_epoch
        pairs = np.sort(np.concatenate(self.batches.step(drawn))) if self.mixture.each == 2 else None
        own = self.parts(drawn)
        passes = []
        for place, numbers in enumerate(own + [self.batches.step(drawn)[0]] * (self.n_everywhere - len(own))):
            about = {"epoch": epoch, "step": step, "micro_batch": rank + place * world_size}  # of several the first
            fields = self.filled_up(self.one_pass(epoch, numbers, pairs))
            passes.append(fields | about | {"again": place >= len(own)})
        return StepBatch.of(passes, len(pairs) if pairs is not None else 0)

    def parts(self, step: int) -> list[np.ndarray]:
        """The numbers of the samples in each pass."""
        micro_batches, n = self.batches.step(step, *self.device), self.n_passes
        if self.shapes:  # sequences are dealt out, the longest first, so that passes are alike
            longest_first = np.concatenate(micro_batches)
            return [longest_first[first::n] for first in range(n)]
        if n < len(micro_batches):
            return [np.concatenate(micro_batches[first::n]) for first in range(n)]
        return micro_batches

    def one_pass(self, epoch: int, numbers: np.ndarray, pairs: np.ndarray | None = None) -> Fields:
        """The sequences with these ``numbers`` ``[B]`` of an epoch. Where a step has ``pairs``, all its sequences in
        order, ``slots`` ``[B]`` says where among them each is."""
        rows, visits, ids = self.mixture.sequences(epoch, numbers)
        fields = collate(rows, ids, visits, self.vocabulary, self.masking, self.extras)
        if pairs is not None:
            fields |= {"slots": np.searchsorted(pairs, numbers), "n_slots": len(pairs)}
        return fields

    def filled_up(self, fields: Fields) -> Fields:
        if self.shapes:
            return filled(fields, self.shapes.fitting(fields))
        return filled(fields, rounded(fields)) if self.few_sizes else fields


class Upcoming(SequentialSampler, DistributedSampler):
    """The steps from a loader's position to the end of its epoch, which may have fewer than there are: Lightning limits
    that number. (It puts a sampler of its own in the place of one that is not distributed where there are several
    devices, and of one that is not sequential for ``overfit_batches``.)"""

    def __init__(self, n_steps: int, limited: int | None, progress: dict[str, int]):
        self.n_steps, self.limited, self.progress = n_steps, limited or n_steps, progress

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[int]:
        first = self.progress["position"]
        return iter(range(first, (first // self.limited + 1) * self.limited))


class StepLoader(DataLoader):
    """Loads the steps of an epoch in order.

    ``waited`` are the seconds that somebody waited for a step, of all loaders, as another may take the place of one.
    Workers that give none for ``PATIENCE`` seconds are an error.

    Args:
        training: else each iteration begins at step 0.
        begin: the number of steps that were taken, where an iteration begins. Without it epochs follow one another.
        steps_per_epoch: of a limited epoch.
    """

    PATIENCE, waited = 1800.0, 0.0

    def __init__(
        self,
        steps: Steps,
        training: bool,
        num_workers: int,
        begin: Callable[[], int] | None = None,
        steps_per_epoch: int | None = None,
    ):
        self.begin = begin if training else lambda: 0
        self.progress = {"position": 0}  # workers run ahead of it
        super().__init__(
            steps,
            batch_size=None,
            sampler=Upcoming(steps.batches.steps_per_epoch, steps_per_epoch, self.progress),
            num_workers=num_workers,
            worker_init_fn=ends_with_its_parent,
            pin_memory=torch.cuda.is_available(),
            timeout=self.PATIENCE if num_workers else 0,
        )

    def __iter__(self) -> Iterator[StepBatch]:  # type: ignore[override]
        if self.begin is not None:
            self.progress["position"] = self.begin()
        began, items = time.perf_counter(), super().__iter__()
        for item in items:
            StepLoader.waited += time.perf_counter() - began
            self.progress["position"] += 1
            yield item
            began = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        return dict(self.progress)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.progress |= state


def ends_with_its_parent(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # the run is to stop, but needs its loader still
        signal.signal(number, signal.SIG_IGN)
