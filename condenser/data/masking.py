"""Dynamic masking for masked language modelling: 15 % of the tokens, whole words by default, 80 / 10 / 10.

A sample's masks are a function of (seed, epoch, sample id) alone, so any process can compute them at any time; a whole
micro-batch is masked in one pass over arrays. Words are taken in random order, and one that would exceed the budget is
skipped, as the authors' collator (and BERT's) does. The three units differ in what is ordered at random: tokens, words,
or spans of words (whose words then follow each other, so that the last span is cut short by the budget).

Legend: B samples, L padded length, W = L candidate words (a word is represented at its first token), M masked tokens.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from condenser.data.hashing import hash_ints, uniform

IGNORED = -100  # the label of a token that is not scored
CHOICE, FATE, REPLACEMENT, SPAN = range(4)  # independent draws for one position
# SpanBERT's span lengths in words (Joshi et al. 2020, section 3.1): geometric with p = 0.2, cut at 10 and renormalised
SPAN_LENGTHS = np.cumsum(0.8 ** np.arange(10)) / np.sum(0.8 ** np.arange(10))

Unit = Literal["word", "token", "span"]


def mask_tokens(
    input_ids: np.ndarray,
    word_starts: np.ndarray,
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int | np.ndarray,
    sample_ids: np.ndarray,
    mask_id: int,
    random_ids: np.ndarray,
    probability: float = 0.15,
    rates: Sequence[float] = (0.8, 0.1, 0.1),
    unit: Unit = "word",
) -> tuple[np.ndarray, np.ndarray]:
    """Mask a batch of token rows that hold no special tokens.

    Args:
        input_ids: ``[B, L]`` token ids, left-aligned.
        word_starts: ``[B, L]`` true where a word begins; the first token of a row always counts as one.
        lengths: ``[B]`` number of real tokens in each row; what comes after is never masked.
        seed, epoch, sample_ids: what the masks are a function of; ``sample_ids`` ``[B]``.
        mask_id: id of the mask token.
        random_ids: the ids that a token may be replaced by at random (no special tokens).
        probability: share of the tokens to predict: ``max(1, round(probability * length))`` in each row.
        rates: shares of these that become the mask token, a random token, or stay as they are.
        unit: "word" masks all tokens of a word or none; "token" chooses tokens one by one; "span" masks runs of whole
            words, which become mask tokens, random tokens or stay as they are together (SpanBERT).

    Returns:
        inputs and labels, int64 ``[B, L]``; labels are the original ids where a token is to be predicted, else -100.
    """
    width = input_ids.shape[1]
    real = np.arange(width) < lengths[:, None]
    starts = np.ones_like(real) if unit == "token" else word_starts.astype(bool)
    starts = starts & real
    starts[:, :1] = real[:, :1]

    sample_keys = hash_ints(seed, epoch, sample_ids)[:, None]  # [B, 1]
    positions = np.arange(width)
    drawn_by = span_of_word(starts, sample_keys) if unit == "span" else np.broadcast_to(positions, starts.shape)
    budget = np.where(lengths > 0, np.maximum(1, np.round(probability * lengths)), 0).astype(np.int64)
    chosen_words = choose_words(sizes_at_starts(starts, real), hash_ints(sample_keys, CHOICE, drawn_by), budget)

    word_of_token = np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
    chosen = np.take_along_axis(chosen_words, word_of_token, axis=1) & real

    inputs = input_ids.astype(np.int64)
    labels = np.where(chosen, inputs, IGNORED)
    rows, columns = chosen.nonzero()  # [M]
    keys = sample_keys[rows, 0]
    fate_of = drawn_by[rows, word_of_token[rows, columns]] if unit == "span" else columns
    fate = uniform(hash_ints(keys, FATE, fate_of))
    drawn = hash_ints(keys, REPLACEMENT, columns) % np.uint64(len(random_ids))
    mask_rate, random_rate, _ = rates
    replacement = np.where(fate < mask_rate + random_rate, random_ids[drawn], inputs[rows, columns])
    inputs[rows, columns] = np.where(fate < mask_rate, mask_id, replacement)
    return inputs, labels


def span_of_word(starts: np.ndarray, sample_keys: np.ndarray) -> np.ndarray:
    """Cut the words of each row into consecutive spans of random lengths; the number of each word's span ``[B, W]``."""
    n_rows, width = starts.shape
    drawn = uniform(hash_ints(sample_keys, SPAN, np.arange(width)))
    ends = np.cumsum(1 + np.searchsorted(SPAN_LENGTHS, drawn, side="right"), axis=1)  # of span 0, 1, ..., in words
    begins = np.zeros((n_rows, width + 1), np.int64)
    np.put_along_axis(begins, np.minimum(ends, width), 1, axis=1)
    word_number = np.maximum(starts.cumsum(axis=1) - 1, 0)
    return np.take_along_axis(begins.cumsum(axis=1), word_number, axis=1)


def sizes_at_starts(starts: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Number of tokens of the word that begins at each position ``[B, L]``, 0 where none begins."""
    n_rows, width = starts.shape
    rows, columns = starts.nonzero()
    lengths = real.sum(axis=1)
    following = np.append(columns[1:], 0)
    last_in_row = np.append(rows[1:] != rows[:-1], True)
    sizes = np.zeros((n_rows, width), np.int64)
    sizes[rows, columns] = np.where(last_in_row, lengths[rows], following) - columns
    return sizes


def choose_words(sizes: np.ndarray, keys: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """Which words are masked: taken by ascending key, skipping any that would exceed what is left of the budget.

    Args:
        sizes: ``[B, W]`` tokens of each candidate word, 0 = no candidate.
        keys: ``[B, W]`` random uint64, the order of the words; words with the same key go by position.
        budget: ``[B]`` tokens to choose.

    Each pass takes the words up to the first one that does not fit, then drops all that are larger than the rest of
    the budget. The first misfit is among those, so the largest remaining size shrinks: few passes, whatever W is.
    """
    position = np.arange(sizes.shape[1], dtype=np.uint64)
    ranks = (
        np.where(sizes > 0, keys >> np.uint64(17) << np.uint64(16), np.uint64(2**64 - 1) << np.uint64(16)) | position
    )
    order = ranks.argsort(axis=1)
    waiting = np.take_along_axis(sizes, order, axis=1)  # sizes in random order; 0 = taken, dropped or no word
    taken = np.zeros(sizes.shape, bool)
    left = budget.copy()
    while waiting.any():
        fits = (waiting > 0) & (waiting.cumsum(axis=1) <= left[:, None])
        taken |= fits
        left -= (waiting * fits).sum(axis=1)
        waiting[fits | (waiting > left[:, None])] = 0
    chosen = np.zeros_like(taken)
    np.put_along_axis(chosen, order, taken, axis=1)
    return chosen
