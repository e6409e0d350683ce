"""Documents to rows of token ids: the pure part of `condenser prepare`.

A document is tokenized once, as a whole; its rows are consecutive slices of those tokens that end where a sentence
ends. So nothing is lost: the rows of a document, put together, are its tokens. Rows are independent blocks, or the
spans of documents (coCondenser), of which a document needs two.

Sentences are found by sentencex: compiled (50 MB/s; the next best reached 25, the common ones below 3), rules for many
languages inside the wheel, and it knows the sentence ends of Chinese and Japanese, which no space follows.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from condenser.data.documents import Document, hash64
from condenser.data.hashing import hash_ints, uniform
from condenser.data.store import SPLITS

SPECIAL_TOKENS = 2  # [CLS] and [SEP]
SPLIT, TARGET = range(2)  # independent draws for one document
PIECE = 1 << 20  # characters that are tokenized at a time
# Scripts written without spaces, as code point ranges: Thai, Lao, Tibetan, Burmese; Khmer; kana; Han; half-width kana
UNSPACED = (
    0x0E00,
    0x10A0,
    0x1780,
    0x1800,
    0x3040,
    0x3100,
    0x3400,
    0xA000,
    0xF900,
    0xFB00,
    0xFF66,
    0xFFA0,
    0x20000,
    0x40000,
)


@dataclass(frozen=True)
class Blocks:
    """How documents become rows: everything besides the text that the tokens in a store depend on."""

    kind: Literal["blocks", "spans"] = "blocks"
    max_length: int = 128
    min_length: int = 1
    short_fraction: float = 0.1
    validation_fraction: float = 0.01
    language: str = "en"
    word_segmenter: str | None = None
    seed: int = 0

    def __post_init__(self):
        if not 8 <= self.max_length <= 65535:
            raise ValueError(f"--max-length {self.max_length} must lie between 8 and 65535")
        if not 1 <= self.min_length <= self.room:
            raise ValueError(f"--min-length {self.min_length} must lie between 1 and {self.room}")
        for name in ("short_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0 and below 1")
        load_segmenter(self.word_segmenter)

    @property
    def room(self) -> int:
        return self.max_length - SPECIAL_TOKENS


@dataclass
class Rows:
    """What a split gets from some documents."""

    tokens: list[np.ndarray] = field(default_factory=list)
    word_starts: list[np.ndarray] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)  # the number of each row's document in the split
    n_documents: int = 0


def cut_documents(documents: list[Document], tokenizer: Any, blocks: Blocks) -> tuple[dict[str, Rows], dict[str, int]]:
    """Tokenize and cut documents: the rows of each split, and what became of documents and tokens."""
    cut = {split: Rows() for split in SPLITS}
    counts = dict.fromkeys(("empty", "too_short", "blocks_dropped", "tokens_kept", "tokens_dropped"), 0)
    counts["tokens_unknown"] = 0
    unknown = tokenizer.token_to_id(str(getattr(tokenizer.model, "unk_token", None) or "<unk>"))
    segment = load_segmenter(blocks.word_segmenter)
    keys = np.array([hash64(document.text) for document in documents], np.uint64)
    in_validation = uniform(hash_ints(blocks.seed, keys, SPLIT)) < blocks.validation_fraction
    for number, (text, _) in enumerate(documents):
        ids, starts, ends = tokenized(text, tokenizer, segment)
        if not len(ids):
            counts["empty"] += 1
            continue
        spans = block_spans(
            sentence_ends(text, ends, blocks.language), blocks, hash_ints(blocks.seed, keys[number], TARGET)
        )
        kept = [(first, end) for first, end in spans if end - first >= blocks.min_length]
        if len(kept) < (2 if blocks.kind == "spans" else 1):
            counts["too_short"] += 1
            kept = []
        n_kept = sum(end - first for first, end in kept)
        counts["blocks_dropped"] += len(spans) - len(kept)
        counts["tokens_kept"] += n_kept
        counts["tokens_dropped"] += len(ids) - n_kept
        counts["tokens_unknown"] += int((ids == unknown).sum())
        if kept:
            rows = cut["validation" if in_validation[number] else "train"]
            rows.tokens += [ids[first:end] for first, end in kept]
            rows.word_starts += [starts[first:end] for first, end in kept]
            rows.documents += [rows.n_documents] * len(kept)
            rows.n_documents += 1
    return cut, counts


def tokenized(text: str, tokenizer: Any, segment: Callable | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, where words start, and each token's end in the text, in characters, ``[n]`` each.

    More than `PIECE` characters are tokenized piece by piece, to bound the memory; pieces begin at spaces.
    """
    ids, words, offsets, base = [], [], [], 0
    for piece in pieces(text):
        encoding = tokenizer.encode(piece, add_special_tokens=False)
        if len(encoding):
            ids.append(np.array(encoding.ids, np.int32))
            words.append(word_starts_of(encoding.word_ids))
            flat = itertools.chain.from_iterable(encoding.offsets)  # np.array of the pairs takes four times as long
            offsets.append(np.fromiter(flat, np.int64, 2 * len(encoding)).reshape(-1, 2) + base)
        base += len(piece)
    if not ids:
        return np.empty(0, np.int32), np.empty(0, bool), np.empty(0, np.int64)
    first, end = np.concatenate(offsets).T
    starts = np.concatenate(words)
    if segment is not None:
        starts = words_of_segmenter(segment, text, first)
    elif not text.isascii():
        starts |= around_unspaced(text, first, end)
    return np.concatenate(ids), starts, end


def pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind(" ", start + 1, start + PIECE)
        end = start + PIECE if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def word_starts_of(word_ids: list[int | None]) -> np.ndarray:
    """True at each token whose word, as the tokenizer numbers them, is not that of the token before."""
    numbers = np.array([-1 if word is None else word for word in word_ids])
    return np.append(True, numbers[1:] != numbers[:-1])


def around_unspaced(text: str, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """True at each token that is, or follows, one of a script without spaces: such a token is a word by itself.

    BERT's tokenizers give every Chinese character a word of its own; SentencePiece's take a whole sentence for one.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    unspaced = np.searchsorted(UNSPACED, characters, side="right") % 2 == 1
    return unspaced[first] | np.append(False, unspaced[np.maximum(end - 1, 0)][:-1])


def load_segmenter(name: str | None) -> Callable[[str], Any] | None:
    """``module:function``, which gives a text's words in order (``jieba:cut``)."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--word-segmenter {name}: give module:function of a function from a text to its words ({error})"
        ) from None


def words_of_segmenter(segment: Callable, text: str, first: np.ndarray) -> np.ndarray:
    """True at each token whose word, as a segmenter finds them, is not that of the token before."""
    begins, at = [], 0
    for word in segment(text):
        at = text.find(word, at)
        if at < 0:
            raise ValueError(f"the word segmenter gave {word!r}, which the text does not go on with")
        begins.append(at)
        at += len(word)
    numbers = np.searchsorted(begins, first, side="right")
    return np.append(True, numbers[1:] != numbers[:-1])


def sentence_ends(text: str, token_ends: np.ndarray, language: str) -> list[int]:
    """Where sentences end, counted in tokens, from the text and each token's end in it (in characters)."""
    import sentencex

    bounds = np.cumsum([len(sentence) for sentence in sentencex.segment(language, text)])
    sentence_of_token = np.searchsorted(bounds, np.maximum.accumulate(token_ends) - 1, side="right")
    return [*(np.flatnonzero(np.diff(sentence_of_token)) + 1).tolist(), len(token_ends)]


def block_spans(ends: list[int], blocks: Blocks, key: np.ndarray) -> list[tuple[int, int]]:
    """Pack whole sentences, greedily, into blocks of at most ``blocks.room`` tokens.

    A block whose target is short still takes its first sentence whole. A sentence longer than the room is cut, and what
    is left of it begins the next block.

    Args:
        ends: where each sentence ends, in tokens, ascending.
        key: what the shorter targets are drawn from.

    Returns:
        (first, end) of each block; together they cover all tokens in order.
    """
    targets = block_targets(blocks, key, len(ends) + ends[-1] // blocks.room + 1)
    spans: list[tuple[int, int]] = []
    first = filled = 0
    for end in ends:
        if end - first > targets[len(spans)] and filled > first:
            spans.append((first, filled))
            first = filled
        while end - first > blocks.room:
            spans.append((first, first + blocks.room))
            first += blocks.room
        filled = end
    return [*spans, (first, filled)]


def block_targets(blocks: Blocks, key: np.ndarray, n: int) -> list[int]:
    """The target lengths of a document's first ``n`` rows: the full room, or now and then a random shorter one."""
    numbers = np.arange(n)
    short = uniform(hash_ints(key, numbers, 0)) < blocks.short_fraction
    drawn = 1 + hash_ints(key, numbers, 1) % np.uint64(blocks.room)
    return np.where(short, drawn, np.uint64(blocks.room)).tolist()
