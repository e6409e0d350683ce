"""Where words start among a text's tokens: what whole-word masking goes by.

Words are the tokenizer's own (``##`` of WordPiece, ``Ġ`` of byte-level BPE, ``▁`` of SentencePiece all come down to the
numbers it gives them), but for scripts written without spaces. There a word is what a named segmenter says, or a token.
"""

import importlib
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

# Code points of scripts written without spaces: Thai, Lao, Tibetan, Burmese; Khmer; kana; Han; half-width kana
UNSPACED_RANGES = [(0xE00, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00)]
UNSPACED_RANGES += [(0xFF60, 0xFFA0), (0x20000, 0x40000)]
UNSPACED = np.zeros(0x110000 >> 5, bool)  # by code point / 32
for low, high in UNSPACED_RANGES:
    UNSPACED[low >> 5 : high >> 5] = True

# What segmenters are tried on: cases, digits, accents of one and of two characters, wide letters, unspaced scripts
TRIAL = "Words 1,5 \u00e9 e\u0301 \uff21\uff11 \u5317\u4eac \u3042 \u0e01\u0e32"
Segmenter = Callable[[str], Any]


def unspaced(text: str) -> np.ndarray:
    """True at each character of a script written without spaces."""
    return UNSPACED[np.frombuffer(text.encode("utf-32-le"), np.uint32) >> 5]


def word_starts(text: str, words: np.ndarray, offsets: np.ndarray, segment: Segmenter | None) -> np.ndarray:
    """True at each token that begins a word, by the number ``[n]`` of each token's word to the tokenizer (or to a word
    segmenter) and ``[n, 2]`` where it begins and ends in the text, in characters."""
    if segment is not None:
        words = np.searchsorted(words_of(segment, text), offsets[:, 0], side="right")
    starts = np.ones(len(words), bool)
    starts[1:] = words[1:] != words[:-1]
    if segment is None and not text.isascii():
        alone, (first, end) = np.append(unspaced(text), False), offsets.T  # some tokens are past the end
        starts |= alone[first]  # BERT's tokenizers number each Chinese character, SentencePiece's a sentence
        starts[1:] |= alone[np.maximum(end[:-1] - 1, 0)]
    if not text.isascii():
        starts[1:] &= offsets[1:, 0] >= np.maximum.accumulate(offsets[:-1, 1])  # bytes of one character
    return starts


def words_between_spaces(text: str, ends: np.ndarray) -> np.ndarray:
    """The number ``[n]`` of the word between spaces that each token ends in, by where tokens end in the text."""
    is_space = np.array([character.isspace() for character in text], bool)
    begins = ~is_space & np.append(True, is_space[:-1])[: len(text)]
    number: np.ndarray = np.append(0, begins.cumsum())[ends].astype(float)
    return number


def words_of(segment: Segmenter, text: str) -> list[int]:
    """Where the words that a segmenter finds begin, in characters."""
    begins, at = [], 0
    try:
        words = [*segment(text)]
    except Exception as error:  # a user's function raises any
        raise ValueError(f"the word segmenter failed on {textwrap.shorten(text, 80)!r}: {error!r}") from error
    for word in words:
        at = text.find(word, at) if isinstance(word, str) else -1
        if at < 0:
            raise ValueError(f"the word segmenter gave {word!r}, which is not next in {textwrap.shorten(text, 80)!r}")
        begins.append(at)
        at += len(word)
    return begins


def load_segmenter(name: str | None) -> Segmenter | None:
    """``module:function``, which gives a text's words in order (``jieba:cut``)."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        segment = getattr(importlib.import_module(module), function)
        words_of(segment, TRIAL)
        return segment
    except Exception as error:  # a module may raise any
        raise ValueError(
            f"--word-segmenter {name}: give module:function of a function from a text to its words ({error})"
        ) from None
