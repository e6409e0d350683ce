"""Masking: rates, whole words, budgets, and that masks depend on (seed, epoch, sample id) alone."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condenser.data.collate import Masking, Vocabulary
from condenser.data.hashing import hash_ints, permuted, uniform
from condenser.data.masking import IGNORED, choose_words, mask_flat, mask_tokens, span_of_word
from condenser.data.tokenizers import load_tokenizer

MASK = 4
ORDINARY = np.arange(5, 1000)


def batch(rows=512, width=60, seed=0):
    """Rows of random words of 1 to 4 tokens, some rows shorter than the batch is wide."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, rows)
    input_ids = rng.choice(ORDINARY, (rows, width))
    word_starts = rng.random((rows, width)) < 0.6
    return input_ids, word_starts, lengths


def masked(input_ids, word_starts, lengths, **options):
    settings = {"seed": 7, "epoch": 0, "sample_ids": np.arange(len(lengths)), "mask_id": MASK, "random_ids": ORDINARY}
    return mask_tokens(input_ids, word_starts, lengths, **{**settings, **options})


def test_over_a_million_tokens_the_rates_are_within_3_sigma():
    input_ids, word_starts, lengths = batch(rows=16_000, width=128)
    assert lengths.sum() > 1_000_000
    inputs, labels = masked(input_ids, word_starts, lengths)
    chosen = labels != IGNORED
    n = chosen.sum()
    assert abs(n / lengths.sum() - 0.15) < 0.001  # budgets are rounded for each row
    kept = (inputs == labels)[chosen].sum()
    mask = (inputs[chosen] == MASK).sum()
    lucky = 0.1 / len(ORDINARY)  # a random token may be the original one
    for count, rate in ((mask, 0.8), (kept, 0.1 + lucky), (n - mask - kept, 0.1 - lucky)):
        assert abs(count - n * rate) < 3 * np.sqrt(n * rate * (1 - rate))


@pytest.mark.parametrize("unit", ["word", "token"])
def test_each_row_gets_its_budget_and_never_more(unit):
    input_ids, word_starts, lengths = batch()
    _, labels = masked(input_ids, word_starts, lengths, unit=unit)
    counts, budget = (labels != IGNORED).sum(axis=1), np.maximum(1, np.round(0.15 * lengths))
    if unit == "token":
        assert (counts == budget).all()
    else:
        assert (counts <= budget).all()
        assert (counts == budget).mean() > 0.8  # a row may hold no word small enough for what is left


def test_words_are_chosen_as_the_authors_greedy_loop_does():
    """Shuffle the words, take each that fits into the rest of the budget: the loop in the authors' collator."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(0, 5, (200, 40))
    keys = hash_ints(3, np.arange(200 * 40)).reshape(200, 40)
    budget = rng.integers(0, 20, 200)
    rows, columns = sizes.nonzero()
    chosen = np.zeros(sizes.shape, bool)
    chosen[rows, columns] = choose_words(sizes[rows, columns], rows, keys[rows, columns], budget)
    for row in range(200):
        left, expected = budget[row], np.zeros(40, bool)
        for word in sorted(range(40), key=lambda word: keys[row, word]):
            if 0 < sizes[row, word] <= left:
                expected[word], left = True, left - sizes[row, word]
        assert (chosen[row] == expected).all()


def test_masks_depend_on_seed_epoch_and_sample_id_and_on_nothing_else():
    input_ids, word_starts, lengths = batch()
    whole = masked(input_ids, word_starts, lengths)
    order = np.array(random.Random(0).sample(range(len(lengths)), 100))
    width = lengths[order].max()
    part = masked(input_ids[order, :width], word_starts[order, :width], lengths[order], sample_ids=order)
    for all_rows, some_rows in zip(whole, part, strict=True):
        assert (all_rows[order, :width] == some_rows).all()
    for change in ({"seed": 8}, {"epoch": 1}, {"sample_ids": np.arange(len(lengths)) + 1}):
        assert (masked(input_ids, word_starts, lengths, **change)[1] != whole[1]).any()


def test_every_token_is_masked_about_equally_often_over_the_epochs():
    input_ids, word_starts, lengths = batch(rows=1, width=40)
    lengths[:] = 40
    hits = sum(masked(input_ids, word_starts, lengths, epoch=e, unit="token")[1] != IGNORED for e in range(4000))
    expected, sigma = 4000 * 0.15, np.sqrt(4000 * 0.15 * 0.85)
    assert (abs(hits - expected) < 4.5 * sigma).all()


def test_random_replacements_are_spread_over_the_ordinary_tokens_only():
    input_ids, word_starts, lengths = batch(rows=4000)
    inputs, labels = masked(input_ids, word_starts, lengths, rates=(0.0, 1.0, 0.0), random_ids=np.arange(5, 25))
    drawn = inputs[labels != IGNORED]
    counts = np.bincount(drawn, minlength=25)
    assert counts[:5].sum() == 0
    expected = len(drawn) / 20
    assert (abs(counts[5:] - expected) < 4.5 * np.sqrt(expected)).all()


def test_a_unit_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="mask_unit=words must be one of word, token, span"):
        Masking(0, unit="words")


def test_span_lengths_are_spanberts_geometric_ones_cut_at_ten():
    spans = span_of_word(np.repeat(np.arange(500), 2000), hash_ints(1, np.arange(500))).reshape(500, 2000)
    lengths = np.concatenate([np.bincount(row)[:300] for row in spans])  # the first 300 spans of each row are whole
    counts, n = np.bincount(lengths, minlength=11)[1:], len(lengths)
    expected = 0.8 ** np.arange(10) / np.sum(0.8 ** np.arange(10))
    assert len(counts) == 10
    assert (abs(counts - n * expected) < 4 * np.sqrt(n * expected * (1 - expected))).all()
    assert abs(lengths.mean() - 3.8) < 0.02  # the mean that the paper states


def test_span_masks_meet_the_budget_in_words_that_stand_together():
    input_ids, word_starts, lengths = batch(rows=2000, width=126)
    lengths[:] = 126
    chosen = masked(input_ids, word_starts, lengths, unit="span")[1] != IGNORED
    counts, budget = chosen.sum(axis=1), round(0.15 * 126)
    assert (counts <= budget).all()
    assert (counts == budget).mean() > 0.5  # the last span is cut where the next word does not fit
    assert counts.mean() > 0.95 * budget
    runs = {unit: n_runs(masked(input_ids, word_starts, lengths, unit=unit)[1] != IGNORED) for unit in ("word", "span")}
    assert runs["span"] < 0.5 * runs["word"]


def n_runs(chosen):
    return (np.diff(chosen.astype(int), axis=1, prepend=0) == 1).sum()


def test_the_tokens_of_a_span_have_one_fate_together():
    input_ids, word_starts, lengths = batch(rows=4000, width=60)
    inputs, labels = masked(input_ids, word_starts, lengths, unit="span", random_ids=np.array([3]))
    chosen = labels != IGNORED
    fate = np.where(inputs == MASK, 0, np.where(inputs == 3, 1, 2))
    starts = word_starts | (np.arange(60) == 0)
    starts &= np.arange(60) < lengths[:, None]
    of_word = span_of_word(starts.nonzero()[0], hash_ints(7, 0, np.arange(4000)))
    spans = of_word[starts.cumsum().reshape(starts.shape) - 1]
    together = chosen[:, 1:] & chosen[:, :-1] & (spans[:, 1:] == spans[:, :-1])
    assert together.sum() > 10_000
    assert (fate[:, 1:][together] == fate[:, :-1][together]).all()
    shares = np.bincount(fate[chosen], minlength=3) / chosen.sum()
    assert (abs(shares - [0.8, 0.1, 0.1]) < 0.02).all()  # tokens of a span are not independent: a wider band


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_the_rows_masks_keep_their_promises(data):
    rows, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    lengths = np.array(data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    word_starts = np.array(data.draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)))
    word_starts = word_starts.reshape(rows, width)
    input_ids = np.random.default_rng(0).choice(ORDINARY, (rows, width))
    unit = data.draw(st.sampled_from(["word", "token", "span"]))
    probability = data.draw(st.floats(0.01, 0.99))
    seed, epoch = data.draw(st.integers(0, 2**63)), data.draw(st.integers(0, 10**6))
    inputs, labels = masked(input_ids, word_starts, lengths, unit=unit, probability=probability, seed=seed, epoch=epoch)
    chosen = labels != IGNORED
    assert (chosen.sum(axis=1) <= np.maximum(1, np.round(probability * lengths))).all()
    assert not (chosen & (np.arange(width) >= lengths[:, None])).any()
    assert (labels[chosen] == input_ids[chosen]).all()
    assert (inputs[~chosen] == input_ids[~chosen]).all()
    assert np.isin(inputs[chosen], [MASK, *ORDINARY]).all()
    if unit == "token":
        assert (chosen.any(axis=1) == (lengths > 0)).all()
        return
    for row, length in enumerate(lengths):
        words = np.split(chosen[row, :length], np.flatnonzero(word_starts[row, 1:length]) + 1)
        assert all(word.all() or not word.any() for word in words)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4097])
def test_permuted_is_a_permutation_and_can_be_asked_for_any_part(n):
    whole = permuted(np.arange(n), n, 5, 0)
    assert sorted(whole) == list(range(n))
    part = np.array([n - 1, n // 2, 0])
    assert (permuted(part, n, 5, 0) == whole[part]).all()


def test_permutations_of_different_keys_are_unrelated_and_uniform():
    n = 20
    places = np.array([permuted(np.arange(n), n, key) for key in range(1500)])  # where each index is sent
    counts = np.array([np.bincount(places[:, index], minlength=n) for index in range(n)])
    assert (abs(counts - 75) < 5 * np.sqrt(75)).all()


def test_hashes_are_uniform():
    values = uniform(hash_ints(1, np.arange(100_000)))
    counts, _ = np.histogram(values, bins=50, range=(0, 1))
    assert (abs(counts - 2000) < 4.5 * np.sqrt(2000)).all()


# What the first version, which went over rows, gave for these: inputs, labels and sample ids are hashed
MASKS_OF_ROWS = {"word": "a472cf7739f28337", "token": "ad501ecd169b7672", "span": "bd41f052ee42c377"}


@pytest.mark.parametrize("unit", MASKS_OF_ROWS)
def test_masks_are_those_that_runs_were_begun_with(unit):
    """A run that goes on, or is repeated, sees the same masks whatever version of this code draws them."""
    input_ids, word_starts, lengths = batch(rows=300, width=90)
    inputs, labels = masked(input_ids, word_starts, lengths, unit=unit)
    inputs[np.arange(90) >= lengths[:, None]] = 0
    assert hashlib.sha256(inputs.tobytes() + labels.tobytes()).hexdigest()[:16] == MASKS_OF_ROWS[unit]


@pytest.mark.parametrize("unit", ["word", "span"])
def test_a_batch_of_more_than_131072_samples_is_masked_like_its_parts(unit):
    rows = (1 << 17) + 3
    tokens, lengths = np.tile(np.arange(5, 9), rows), np.full(rows, 4)
    options = {"seed": 1, "epoch": 0, "mask_id": MASK, "random_ids": ORDINARY, "unit": unit, "probability": 0.5}
    starts = tokens != 6
    whole = mask_flat(tokens, starts, lengths, sample_ids=np.arange(rows), **options)[0].reshape(rows, 4)
    part = mask_flat(tokens[-40:], starts[-40:], lengths[-10:], sample_ids=np.arange(rows)[-10:], **options)[0]
    assert (whole[-10:] == part.reshape(10, 4)).all()


def test_no_token_is_replaced_by_one_that_is_special_in_the_tokenizers_file_alone(store, tmp_path):
    shutil.copytree(store / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": len(content["model"]["vocab"]), "content": "<|x|>", "special": True, **flags})
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    number = tokenizer.get_vocab()["<|x|>"]
    assert number not in tokenizer.all_special_ids
    assert number not in Vocabulary.of(tokenizer).random_ids
