"""A document's text to its tokens, where words start among them, and where sentences end.

Sentences are found by sentencex: compiled (50 MB/s; the next best reached 25, the common ones below 3), rules for many
languages inside the wheel, and it knows the sentence ends of Chinese and Japanese, which no space follows.

What a text spells out as special tokens ([MASK], </s>) is text like any other.

The general way tokenizes a text as a whole and asks the tokenizer where each token is. BERT's own tokenizers never join
characters across white space or punctuation, so for them sentences can be tokenized one by one, which gives the same
tokens without asking: a quarter quicker.
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from condenser.corpus.readers import groups
from condenser.corpus.words import Segmenter, unspaced, word_starts, words_between_spaces
from condenser.data.tokenizers import vocabulary_size

OTHER_SPACES = re.compile("[\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]")
PIECE = 1 << 20  # characters that are tokenized at a time


class Encoded(NamedTuple):
    ids: np.ndarray  # [n]
    word_starts: np.ndarray  # [n], true where a word begins
    sentence_ends: list[int]  # in tokens, ascending; the last is n


class Encoder:
    """Encodes texts with a tokenizer of the tokenizers library.

    Args:
        language: of the sentence splitter, as an ISO 639-1 code.
        segment: a word segmenter, whose words count instead of the tokenizer's.
    """

    def __init__(self, tokenizer: Any, language: str = "en", segment: Segmenter | None = None):
        self.tokenizer, self.special_tokens = without_special_tokens(tokenizer)
        self.language, self.segment = language, segment
        self.n_ids = vocabulary_size(tokenizer)
        # to tokenizers of Llama's and Gemma's kind a text is one word
        self.keeps_spaces = len({*self.tokenizer.encode("a b a b", add_special_tokens=False).word_ids}) == 1
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
        self.by_sentence = segment is None and is_bert(tokenizer) and all(map(str.isalnum, added))
        if self.by_sentence:
            pieces = [self.tokenizer.id_to_token(token_id) or "" for token_id in range(self.n_ids)]
            goes_on = tokenizer.model.continuing_subword_prefix
            bare = [piece.removeprefix(goes_on) or " " for piece in pieces]
            self.alone_from = unspaced("".join(piece[0] for piece in bare))  # by token id
            self.alone_until = unspaced("".join(piece[-1] for piece in bare))
            self.starts = np.array([not piece.startswith(goes_on) for piece in pieces]) | self.alone_from

    def __call__(self, text: str) -> Encoded:
        return self.sentence_by_sentence(text) if self.by_sentence else self.as_a_whole(text)

    def sentence_by_sentence(self, text: str) -> Encoded:
        bounds = itertools.pairwise([0, *sentence_bounds(text, self.language)])
        parts = (piece for begin, end in bounds for piece in pieces_of(text[begin:end]))
        sizes: list[int] = []
        ids = [np.empty(0, np.int32)]
        for group in groups(parts, PIECE, len):
            encodings = self.tokenizer.encode_batch_fast(group, add_special_tokens=False)
            sizes += map(len, encodings)
            ids.append(np.fromiter(itertools.chain.from_iterable([e.ids for e in encodings]), np.int32))
        together = np.concatenate(ids)
        starts = self.starts[together]
        starts[1:] |= self.alone_until[together[:-1]]
        return Encoded(together, starts, sorted({*itertools.accumulate(sizes)} - {0}))

    def as_a_whole(self, text: str) -> Encoded:
        ids, words, offsets, base = [], [], [], 0
        for piece in pieces_of(text):
            encoding = self.tokenizer.encode(piece, add_special_tokens=False)
            ids.append(np.array(encoding.ids, np.int32))
            of_tokenizer = np.array(encoding.word_ids, float)  # None outside words: nan, unlike any other
            flat = itertools.chain.from_iterable(encoding.offsets)  # np.array of the pairs takes four times as long
            offsets.append(np.fromiter(flat, np.int64, 2 * len(encoding)).reshape(-1, 2) + base)
            if self.keeps_spaces:
                between = words_between_spaces(piece, offsets[-1][:, 1] - base)
                of_tokenizer = of_tokenizer + between * (len(piece) + 1)
            words.append(of_tokenizer + base)
            base += len(piece)
        places = np.concatenate(offsets)
        bounds = sentence_bounds(text, self.language)
        ends = np.searchsorted(np.maximum.accumulate(places[:, 1]), bounds, side="right")
        starts = word_starts(text, np.concatenate(words), places, self.segment)
        return Encoded(np.concatenate(ids), starts, sorted({*ends.tolist(), len(places)} - {0}))


def without_special_tokens(tokenizer: Any) -> tuple[Any, list[str]]:
    """The tokenizer, to which its special tokens in a text are text; and these.

    It is no use to tell the library not to look for them (``encode_special_tokens``): some models find them in their
    vocabulary all the same. So there they get names that no text holds.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    names = {piece: f"\0{piece}" for piece in special}
    for token in state["added_tokens"]:  # all stay, as the library numbers them anew
        if token["content"] in names:
            token["content"], token["normalized"] = names[token["content"]], False  # else it might be normalized back
    state["truncation"] = state["padding"] = None
    model = state["model"]
    if "merges" in model:  # those that spell one, or go on from it
        model["merges"] = [merge for merge in model["merges"] if special.isdisjoint([*merge, "".join(merge)])]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    else:  # of pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    same = Tokenizer.from_str(json.dumps(state))
    ids = {names.get(piece, piece): token_id for piece, token_id in tokenizer.get_vocab().items()}
    assert same.get_vocab() == ids, "a token has another id"
    return same, sorted(special)


def is_bert(tokenizer: Any) -> bool:
    from tokenizers import models, normalizers, pre_tokenizers

    return (
        isinstance(tokenizer.model, models.WordPiece)
        and bool(tokenizer.model.continuing_subword_prefix)  # else no token says whether it begins a word
        and isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
    )


def sentence_bounds(text: str, language: str) -> list[int]:
    """Where the sentences of a text end, in characters, ascending; the last is the text's end."""
    import sentencex

    # which counts bytes where it meets other spaces, and panics
    plain = text if text.isascii() else OTHER_SPACES.sub(" ", text)
    try:
        bounds = [sentence["end_index"] for sentence in sentencex.get_sentence_boundaries(language, plain)]
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        bounds = [number for number, character in enumerate(text, 1) if character == "\n"] + [len(text)]
    return [*bounds[:-1], len(text)]


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, to bound the memory; they begin at spaces where there are any."""
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind(" ", start + 1, start + PIECE)
        end = start + PIECE if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]
