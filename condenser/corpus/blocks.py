"""Documents to rows of token ids: the pure part of `condenser prepare`.

The rows of a document are consecutive slices of its tokens that end where a sentence ends. So nothing is lost: put
together, they are the document's tokens. Rows are independent blocks, or the spans of documents (coCondenser), of which
a document needs two.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from condenser.corpus.documents import Document
from condenser.corpus.encoding import Encoder
from condenser.corpus.words import load_segmenter
from condenser.data.hashing import hash_ints, uniform
from condenser.data.store import SPECIAL_TOKENS, SPLITS

# What is given instead of the codes of languages that the sentence splitter has rules for; others are English to it
MISTAKEN = (
    "amh:am ara:ar arm:hy ben:bn bul:bg bur:my cat:ca ces:cs chi:zh cn:zh cz:cs cze:cs dan:da deu:de dk:da dut:nl "
    "ell:el eng:en fin:fi fra:fr fre:fr ger:de glg:gl gr:el gre:el guj:gu hin:hi hye:hy ita:it jp:ja jpn:ja kan:kn "
    "kaz:kk ltz:lb mal:ml mar:mr mya:my nld:nl oci:oc pan:pa pol:pl por:pt rus:ru slk:sk slo:sk spa:es tam:ta tel:te "
    "ua:uk ukr:uk zho:zh"
)
SPLIT, TARGET = range(2)  # independent draws for one document


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
        if self.kind not in ("blocks", "spans"):
            raise ValueError(f"--kind {self.kind} must be blocks or spans")
        if not re.fullmatch("[a-z]{2,3}", self.language):
            raise ValueError(f"--language {self.language} must be a code of ISO 639-1, such as en or zh")
        if meant := re.search(rf"\b{self.language}:(..)", MISTAKEN):
            raise ValueError(f"--language {self.language}: in ISO 639-1 it is {meant[1]}, give that")
        if not 8 <= self.max_length <= 65535:
            raise ValueError(f"--max-length {self.max_length} must lie between 8 and 65535")
        if not 1 <= self.min_length <= self.room:
            raise ValueError(f"--min-length {self.min_length} must lie between 1 and {self.room}")
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"--seed {self.seed} must be a number of 64 bits")
        for name in ("short_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0 and below 1")
        load_segmenter(self.word_segmenter)

    @property
    def room(self) -> int:
        return self.max_length - SPECIAL_TOKENS


@dataclass
class Cut:
    """What a split gets from some documents: rows one after the other."""

    tokens: list[np.ndarray] = field(default_factory=list)  # of each row
    word_starts: list[np.ndarray] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)  # the number of each row's document in the split
    n_documents: int = 0

    def add(self, ids: np.ndarray, word_starts: np.ndarray, spans: list[tuple[int, int]]) -> None:
        """A document of these rows."""
        self.tokens += [ids[first:end] for first, end in spans]
        self.word_starts += [word_starts[first:end] for first, end in spans]
        self.documents += [self.n_documents] * len(spans)
        self.n_documents += 1


def cut_documents(documents: list[Document], encode: Encoder, blocks: Blocks) -> tuple[dict[str, Cut], dict[str, int]]:
    """Encode and cut documents: the rows of each split, and what became of documents and tokens."""
    cut = {split: Cut() for split in SPLITS}
    names = "empty", "too_short", "rows_dropped", "tokens_kept", "tokens_dropped", "special_tokens_as_text"
    counts = dict.fromkeys(names, 0)
    keys = np.array([document.content for document in documents], np.uint64)
    in_validation = uniform(hash_ints(blocks.seed, keys, SPLIT)) < blocks.validation_fraction
    targets = hash_ints(blocks.seed, keys, TARGET)
    for number, (text, *_) in enumerate(documents):
        ids, starts, sentence_ends = encode(text)
        counts["special_tokens_as_text"] += sum(map(text.count, encode.special_tokens))
        spans = block_spans(sentence_ends, blocks, targets[number]) if len(ids) else []
        kept = [(first, end) for first, end in spans if end - first >= blocks.min_length]
        if len(kept) >= (2 if blocks.kind == "spans" else 1):
            cut["validation" if in_validation[number] else "train"].add(ids, starts, kept)
        else:
            counts["too_short" if spans else "empty"] += 1
            kept = []
        n_kept = sum(end - first for first, end in kept)
        counts["rows_dropped"] += len(spans) - len(kept)
        counts["tokens_kept"] += n_kept
        counts["tokens_dropped"] += len(ids) - n_kept
    return cut, counts


def block_spans(ends: list[int], blocks: Blocks, key: np.ndarray) -> list[tuple[int, int]]:
    """Pack whole sentences, which end at these ``ends`` in tokens, greedily into blocks of at most ``blocks.room``: the
    (first, end) of each, which together cover all tokens in order.

    Now and then the target of a block is a random shorter one, drawn from ``key``; it still takes its first sentence
    whole. A sentence longer than the room is cut, and what is left of it begins the next block.
    """
    numbers, room = np.arange(len(ends) + ends[-1] // blocks.room + 1), np.uint64(blocks.room)  # no more blocks
    is_short = uniform(hash_ints(key, numbers, 0)) < blocks.short_fraction
    targets = np.where(is_short, 1 + hash_ints(key, numbers, 1) % room, room).tolist()
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
