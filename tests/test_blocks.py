"""Documents to rows of tokens: sentences, words and spans, in any language."""

import numpy as np
from transformers import AutoTokenizer

from condenser.data.blocks import Blocks, block_spans, cut_documents, sentence_ends, word_starts_of
from condenser.data.documents import Document
from condenser.data.hashing import hash_ints


def test_blocks_end_where_sentences_end_unless_a_sentence_is_longer_than_a_block():
    blocks = Blocks(max_length=32)
    rng = np.random.default_rng(0)
    for number in range(300):
        sizes = rng.integers(1, 45, rng.integers(1, 12))
        ends = np.cumsum(sizes).tolist()
        spans = block_spans(ends, blocks, hash_ints(number))
        assert [first for first, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == ends[-1]
        assert all(0 < end - first <= blocks.room for first, end in spans)
        for first, end in spans:
            if end not in ends:  # cut inside a sentence: it was too long for any block, and this block is full
                sentence = next(i for i, sentence_end in enumerate(ends) if sentence_end > end)
                assert sizes[sentence] > blocks.room
                assert end - first == blocks.room


def test_a_tenth_of_the_blocks_has_a_random_shorter_target():
    blocks = Blocks(max_length=130)
    spans = block_spans(list(range(1, 200_000)), blocks, hash_ints(0))  # one-token sentences: targets are met exactly
    sizes = np.array([end - first for first, end in spans[:-1]])
    short = (sizes < blocks.room).mean()
    assert abs(short - 0.1) < 3 * np.sqrt(0.09 / len(sizes))
    assert abs(sizes[sizes < blocks.room].mean() - 64) < 10


def test_word_starts_are_the_tokenizers_own_words(store):
    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
    backend = tokenizer.backend_tokenizer
    documents = [Document("Retrieving, unencoded tokens; reranked.", 0)]
    rows = cut_documents(documents, backend, Blocks(max_length=32, validation_fraction=0.0))[0]["train"]
    tokens = tokenizer.convert_ids_to_tokens(rows.tokens[0])
    assert [not token.startswith("##") for token in tokens] == rows.word_starts[0].tolist()
    assert any(token.startswith("##") for token in tokens)


def test_a_byte_level_tokenizers_words_are_right_too(roberta):
    text = "Attending heads, rerankers."
    encoding = AutoTokenizer.from_pretrained(roberta).backend_tokenizer.encode(text, add_special_tokens=False)
    starts = word_starts_of(encoding.word_ids)
    words = "".join("|" * int(start) + token for start, token in zip(starts, encoding.tokens, strict=True))
    assert words.replace("Ġ", "") == "|Attending|heads|,|rerankers|."


def test_sentences_are_found_in_tokens_even_without_spaces_between_them():
    text = "我喜欢猫。他也是。 The end. New one?"
    ends = sentence_ends(text, np.arange(1, len(text) + 1), "en")  # one token a character
    assert [text[a:b].strip() for a, b in zip([0, *ends], ends, strict=False)] == [
        "我喜欢猫。",
        "他也是。",
        "The end.",
        "New one?",
    ]
