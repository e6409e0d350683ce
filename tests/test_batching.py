"""Batches: every sample once an epoch, equal tokens, the same whatever the devices, any step at once."""

import tracemalloc

import numpy as np
import pytest
from conftest import numpy_calls

from condenser.data.batching import BucketedBatches, equal_bounds


def corpus_lengths(n=20_000, seed=0):
    """Lengths like those of packed blocks: most near 128, a tail of short ones."""
    rng = np.random.default_rng(seed)
    lengths = 128 - rng.exponential(20, n)
    short = rng.random(n) < 0.1
    return np.where(short, rng.uniform(3, 128, n), lengths).clip(3, 128).astype(np.uint16)


def batches(lengths, **settings):
    return BucketedBatches(lengths, **{"batch_size": 256, "micro_batches_per_step": 8, "seed": 1, **settings})


def epoch_steps(order, epoch=0, **place):
    return [order.step(epoch * order.steps_per_epoch + i, **place) for i in range(order.steps_per_epoch)]


@pytest.mark.parametrize("n", [8, 9, 255, 1000, 20_000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_sample_comes_exactly_once_an_epoch(n, epoch):
    order = batches(corpus_lengths(n), batch_size=64)
    seen = np.concatenate([part for step in epoch_steps(order, epoch) for part in step])
    assert sorted(seen) == list(range(n))


def test_any_step_can_be_asked_for_first():
    replayed = epoch_steps(batches(corpus_lengths()))
    for i in (40, 3, 77):
        direct = batches(corpus_lengths()).step(i)
        assert all((a == b).all() for a, b in zip(direct, replayed[i], strict=True))


def test_steps_and_micro_batches_have_equal_tokens_up_to_a_sequence():
    lengths = corpus_lengths()
    order = batches(lengths, added=2)
    steps = [[int(lengths[part].sum()) + 2 * len(part) for part in step] for step in epoch_steps(order)]
    for parts in steps:
        assert np.abs(np.array(parts) - np.mean(parts)).max() <= 130
    for first in range(0, len(steps) - 8, 8):
        window = [sum(parts) for parts in steps[first : first + 8]]
        assert np.ptp(window) < 0.05 * np.mean(window)


@pytest.mark.parametrize("micro_batches_per_step", [1, 8])
@pytest.mark.parametrize("batch_size", [32, 1024])
def test_every_token_weighs_alike_whatever_its_row_and_the_number_of_micro_batches(batch_size, micro_batches_per_step):
    """A step's loss is a mean, so a token weighs 1 / the step's tokens; by quarters of the rows' lengths."""
    lengths = corpus_lengths(100_000)
    order = batches(lengths, batch_size=batch_size, micro_batches_per_step=micro_batches_per_step, added=2)
    tokens, weight = lengths + 2.0, np.zeros(len(lengths))
    for step in epoch_steps(order):
        samples = np.concatenate(step)
        weight[samples] = tokens.sum() / order.steps_per_epoch / tokens[samples].sum()
    quarter = np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths)
    for number in range(4):
        assert np.average(weight[quarter == number], weights=tokens[quarter == number]) == pytest.approx(1, abs=4e-3)


def test_a_micro_batch_holds_rows_of_like_length():
    lengths = corpus_lengths()
    spread = [np.ptp(lengths[part]) for step in epoch_steps(batches(lengths)) for part in step[:-1]]
    assert np.mean(spread) < 15  # of 125


def test_steps_have_the_mix_of_lengths_of_the_corpus():
    lengths = corpus_lengths()
    means = [np.mean(lengths[np.concatenate(step)]) for step in epoch_steps(batches(lengths))]
    assert np.std(means) < 0.08 * np.std(lengths)  # sorted batches would have all of it, random ones 0.06


def test_epochs_and_seeds_have_different_orders():
    lengths = corpus_lengths()
    first = [set(np.concatenate(step)) for step in epoch_steps(batches(lengths))]
    for other in (epoch_steps(batches(lengths), epoch=1), epoch_steps(batches(lengths, seed=2))):
        overlap = np.mean([len(a & set(np.concatenate(b))) for a, b in zip(first, other, strict=True)])
        assert overlap < 20  # two random steps of 256 out of 20,000 share 3


def test_a_hundred_million_rows_take_two_bytes_each_and_any_step_a_moment(capsys):
    """Counted, not timed: what a step allocates does not depend on the number of rows."""
    peaks = []
    for n in (1_000_000, 100_000_000):
        lengths = np.resize(corpus_lengths(), n)
        tracemalloc.start()
        order = batches(lengths, batch_size=1024)
        order.step(order.steps_per_epoch * 3 + 1234)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert order.samples.lengths is lengths
        assert lengths.nbytes == 2 * n
    assert peaks[1] < 1.5 * peaks[0] < 2**21


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 4}, "batch_size is 4"),
        ({"micro_batches_per_step": 0}, "must be at least 1"),
        ({"lengths": np.array([5] * 7)}, "there are 7 sequences"),
        ({"lengths": np.array([5, 0] * 9)}, "sample 1 has length 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        batches(**{"lengths": np.array([5] * 100), **settings})


@pytest.mark.parametrize("least", [1, 2, 3])
def test_bounds_leave_each_part_as_many_samples_as_are_asked_for(least):
    rng = np.random.default_rng(0)
    for _ in range(200):
        n_parts = int(rng.integers(1, 12))
        tokens = rng.integers(1, rng.choice([2, 500]), n_parts * least + int(rng.integers(0, 5)))
        bounds = equal_bounds(tokens, n_parts, least)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, len(tokens), n_parts + 1)
        assert np.diff(bounds).min() >= least


def test_the_window_is_cut_by_a_search_for_each_step_however_many_micro_batches_there_are():
    """Counted, not timed: 128 micro-batches a step took seconds."""
    for micro_batches in (8, 128):
        order = batches(corpus_lengths(100_000), batch_size=4096, micro_batches_per_step=micro_batches)
        assert numpy_calls(lambda: order.step(0), "searchsorted") == 9  # noqa: B023, called at once
