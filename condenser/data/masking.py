"""Dynamic masking for masked language modelling: 15 % of the tokens, whole words by default, 80 / 10 / 10.

A sample's masks are a function of (seed, epoch, sample id) alone, so any process can compute them at any time; samples
lie one after the other in flat arrays, and all of them are masked in one pass over these. Words are taken in random
order, and one that would exceed the budget is skipped, as the authors' collator (and BERT's) does. The three units
differ in what is ordered at random: tokens, words, or spans of words (whose words then follow each other, so that the
last span is cut short by the budget).

Legend: B samples, T tokens of all samples, W words (with ``unit="token"`` every token is one), M masked tokens.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from condenser.data.hashing import hash_ints, mix, uniform

IGNORED = -100  # the label of a token that is not scored
CHOICE, FATE, REPLACEMENT, SPAN = range(4)  # independent draws for one position
# SpanBERT's span lengths in words (Joshi et al. 2020, section 3.1): geometric with p = 0.2, cut at 10 and renormalised
SPAN_LENGTHS = np.cumsum(0.8 ** np.arange(10)) / np.sum(0.8 ** np.arange(10))

Unit = Literal["word", "token", "span"]


def mask_tokens(
    input_ids: np.ndarray, word_starts: np.ndarray, lengths: np.ndarray, **options
) -> tuple[np.ndarray, np.ndarray]:
    """`mask_flat` for rows ``[B, L]``, left-aligned, of which what comes after ``lengths`` ``[B]`` is never masked.

    Returns:
        inputs and labels, int64 ``[B, L]``; labels are the original ids where a token is to be predicted, else -100.
    """
    real = np.arange(input_ids.shape[1]) < lengths[:, None]
    tokens = input_ids[real]
    changed, masked = mask_flat(tokens, word_starts[real].astype(bool), lengths, **options)
    inputs, labels = input_ids.astype(np.int64), np.full(input_ids.shape, IGNORED, np.int64)
    inputs[real] = changed
    flat_labels = np.full(len(tokens), IGNORED, np.int64)
    flat_labels[masked] = tokens[masked]
    labels[real] = flat_labels
    return inputs, labels


def mask_flat(
    tokens: np.ndarray,
    word_starts: np.ndarray,
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int | np.ndarray,
    sample_ids: np.ndarray,
    mask_id: int,
    random_ids: np.ndarray,
    probability: float | np.ndarray = 0.15,
    rates: Sequence[float] = (0.8, 0.1, 0.1),
    unit: Unit = "word",
) -> tuple[np.ndarray, np.ndarray]:
    """Mask samples that hold no special tokens.

    Args:
        tokens: ``[T]`` token ids of all samples, one after the other.
        word_starts: ``[T]`` true where a word begins; the first token of a sample always counts as one.
        lengths: ``[B]`` tokens of each sample.
        seed, epoch, sample_ids: what the masks are a function of; ``sample_ids`` ``[B]``, ``epoch`` one or ``[B]``.
        mask_id: id of the mask token.
        random_ids: the ids that a token may be replaced by at random (no special tokens).
        probability: share of the tokens to predict, one or ``[B]``: ``max(1, round(probability * length))`` in each
            sample, or fewer where no word is short enough for what is left (none of a single word that is longer).
        rates: shares of these that become the mask token, a random token, or stay as they are.
        unit: "word" masks all tokens of a word or none; "token" chooses tokens one by one; "span" masks runs of whole
            words, which become mask tokens, random tokens or stay as they are together (SpanBERT); where a sample
            begins, so does a span, and as the budget cuts off ends its first word is masked more often: 0.20 for 0.15.

    Returns:
        the changed tokens, int64 ``[T]``, and which of them are to be predicted, ascending ``[M]``.
    """
    first = np.cumsum(lengths) - lengths  # [B]
    sample_of_token = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.ones(len(tokens), bool) if unit == "token" else word_starts.copy()
    starts[first[lengths > 0]] = True
    at = np.flatnonzero(starts)  # [W], where each word begins
    sizes = np.diff(at, append=len(tokens))
    sample_of_word = sample_of_token[at]

    keys = hash_ints(seed, epoch, sample_ids)  # [B]
    drawn_by = span_of_word(sample_of_word, keys) if unit == "span" else at - first[sample_of_word]
    budget = np.where(lengths > 0, np.maximum(1, np.round(probability * lengths)), 0).astype(np.int64)
    taken = choose_words(sizes, sample_of_word, draw(keys, CHOICE, sample_of_word, drawn_by), budget)

    masked = np.flatnonzero(np.repeat(taken, sizes))
    sample = sample_of_token[masked]
    position = masked - first[sample]
    fate_of = np.repeat(drawn_by[taken], sizes[taken]) if unit == "span" else position
    fate = uniform(draw(keys, FATE, sample, fate_of))
    drawn = draw(keys, REPLACEMENT, sample, position) % np.uint64(len(random_ids))
    mask_rate, random_rate, _ = rates
    inputs = tokens.astype(np.int64)
    replacement = np.where(fate < mask_rate + random_rate, random_ids[drawn], inputs[masked])
    inputs[masked] = np.where(fate < mask_rate, mask_id, replacement)
    return inputs, masked


def draw(keys: np.ndarray, purpose: int, sample: np.ndarray, number: np.ndarray) -> np.ndarray:
    """``hash_ints(keys[sample], purpose, number)``, where what depends on the sample alone is hashed once."""
    return mix(hash_ints(keys, purpose)[sample] ^ number.astype(np.uint64))


def ordinals(groups: np.ndarray) -> np.ndarray:
    """The place of each element in its group, of ``groups`` in ascending order: [0, 0, 3] -> [0, 1, 0]."""
    changes = np.flatnonzero(np.diff(groups, prepend=-1))  # where each group begins
    return np.arange(len(groups)) - np.repeat(changes, np.diff(changes, append=len(groups)))


def span_of_word(sample_of_word: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Cut each sample's words into consecutive spans of random lengths; the number of each word's span ``[W]``."""
    number = ordinals(sample_of_word)
    before = np.arange(len(number)) - number  # words of earlier samples
    drawn = uniform(draw(keys, SPAN, sample_of_word, number))  # of a sample's span 0, 1, ...: it has no more than words
    reach = np.cumsum(1 + np.searchsorted(SPAN_LENGTHS, drawn, side="right"))
    ends = before + reach - np.append(0, reach)[before]  # where each span would end, in words of all samples
    inside = ends < np.searchsorted(sample_of_word, sample_of_word, side="right")  # of its sample
    begins = np.zeros(len(number), np.int64)
    begins[ends[inside]] = 1
    spans = begins.cumsum()
    return spans - spans[before] + begins[before]


def choose_words(sizes: np.ndarray, sample_of_word: np.ndarray, keys: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """Which words are masked: taken by ascending key, skipping any that would exceed what is left of the budget.

    Args:
        sizes: ``[W]`` tokens of each word.
        sample_of_word: ``[W]`` ascending.
        keys: ``[W]`` random uint64, the order of a sample's words; words with the same upper 47 bits go by position.
        budget: ``[B]`` tokens to choose.

    Each round takes the words up to the first one that does not fit, then drops all that are larger than the rest of
    the budget. The first misfit is among those, so the largest remaining size shrinks: few rounds, whatever W is.
    """
    ranks = sample_of_word.astype(np.uint64) << np.uint64(47) | keys >> np.uint64(17)  # 17 bits and 47
    waiting = ranks.argsort()
    if len(budget) >= 1 << 17 or (ranks[waiting[1:]] == ranks[waiting[:-1]]).any():
        waiting = np.lexsort((keys >> np.uint64(17), sample_of_word))  # stable, and several times slower
    taken = np.zeros(len(sizes), bool)
    left = budget.copy()
    while len(waiting):
        size, sample = sizes[waiting], sample_of_word[waiting]
        reach = size.cumsum()
        of_sample = np.bincount(sample, size, len(budget))
        allowed = (of_sample.cumsum() - of_sample + left).astype(np.int64)  # as far as each sample's words may reach
        fits = reach <= allowed[sample]
        taken[waiting[fits]] = True
        left -= np.bincount(sample[fits], size[fits], len(budget)).astype(np.int64)
        waiting = waiting[~fits & (size <= left[sample])]
    return taken
