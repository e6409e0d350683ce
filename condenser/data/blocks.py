"""Documents to blocks of token ids: the pure part of `condenser prepare`.

A document is tokenized once, as a whole; its blocks are consecutive slices of those tokens that end where a sentence
ends. So nothing is lost: the blocks of a document, put together, are its tokens.

Sentences are found by sentencex: compiled, many languages, its rules inside the wheel.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from condenser.data.hashing import hash_ints, uniform
from condenser.data.store import SPLITS

SPECIAL_TOKENS = 2  # [CLS] and [SEP]
SPLIT, TARGET = range(2)  # independent draws for one document


@dataclass(frozen=True)
class Blocks:
    """How documents become blocks: everything besides the text that the tokens in a store depend on."""

    max_length: int
    min_length: int
    short_fraction: float
    validation_fraction: float
    language: str
    seed: int

    def __post_init__(self):
        if not 8 <= self.max_length <= 65535:
            raise ValueError(f"--max-length {self.max_length} must lie between 8 and 65535")
        if not 1 <= self.min_length <= self.room:
            raise ValueError(f"--min-length {self.min_length} must lie between 1 and {self.room}")
        for name in ("short_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0 and below 1")

    @property
    def room(self) -> int:
        return self.max_length - SPECIAL_TOKENS


def cut_documents(texts: list[str], tokenizer: Any, blocks: Blocks) -> tuple[dict[str, tuple[list, list]], dict]:
    """Tokenize and cut documents: for each split its blocks' token ids and word starts, and what was counted."""
    cut: dict[str, tuple[list, list]] = {split: ([], []) for split in SPLITS}
    stats: dict[str, Any] = {split: {"documents": 0} for split in SPLITS}
    stats |= {"documents": len(texts), "empty_documents": 0, "tokens_kept": 0, "tokens_dropped": 0, "blocks_dropped": 0}
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        if not encoding.ids:
            stats["empty_documents"] += 1
            continue
        key = int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        in_validation = uniform(hash_ints(blocks.seed, key, SPLIT)) < blocks.validation_fraction
        split = "validation" if in_validation else "train"
        stats[split]["documents"] += 1
        ids, starts = np.array(encoding.ids), word_starts_of(encoding.word_ids)
        ends = sentence_ends(text, np.array(encoding.offsets)[:, 1], blocks.language)
        for first, end in block_spans(ends, blocks, hash_ints(blocks.seed, key, TARGET)):
            if end - first < blocks.min_length:
                stats["blocks_dropped"] += 1
                stats["tokens_dropped"] += end - first
                continue
            cut[split][0].append(ids[first:end])
            cut[split][1].append(starts[first:end])
            stats["tokens_kept"] += end - first
    return cut, stats


def word_starts_of(word_ids: list[int | None]) -> np.ndarray:
    """True at each token whose word, as the tokenizer numbers them, is not that of the token before."""
    numbers = np.array([-1 if word is None else word for word in word_ids])
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
    spans: list[tuple[int, int]] = []
    first = filled = 0

    def close(end: int) -> int:
        spans.append((first, end))
        return block_target(blocks, key, len(spans))

    target = block_target(blocks, key, 0)
    for end in ends:
        if end - first > target and filled > first:
            target, first = close(filled), filled
        while end - first > blocks.room:
            target, first = close(first + blocks.room), first + blocks.room
        filled = end
    close(filled)
    return spans


def block_target(blocks: Blocks, key: np.ndarray, number: int) -> int:
    """The target length of a document's block ``number``: the full room, or now and then a random shorter one."""
    if uniform(hash_ints(key, number, 0)) >= blocks.short_fraction:
        return blocks.room
    return 1 + int(hash_ints(key, number, 1) % np.uint64(blocks.room))
