"""Documents to rows of tokens: sentences, words and spans, in any language."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from conftest import make_documents, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import refused
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from condenser.corpus.blocks import Blocks, block_spans, cut_documents
from condenser.corpus.documents import Document, hash64
from condenser.corpus.encoding import Encoder, sentence_bounds
from condenser.corpus.words import unspaced, word_starts
from condenser.data.hashing import hash_ints

FORMS = ("NFC", "NFD", "NFKC")  # of Unicode


def document(text):
    return Document(text, hash64(text.encode()), 0)


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


@pytest.fixture(scope="module")
def sentencepiece():
    """A Unigram tokenizer as XLM-R, ALBERT and DeBERTa have: ▁ stands for the space before a word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*make_documents(100), *LANGUAGES.values()] * 4, trainer)
    return tokenizer


LANGUAGES = {
    "zh": "北京是中国的首都。它有三千年的历史!我们去BERT学校吗?很好。",
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたか。",
    "ar": "القطة على السجادة. أين الكلب؟ ذهب إلى البيت!",
    "he": "החתול ישב על המחצלת. איפה הכלב? הוא הלך הביתה.",
    "th": "แมวนั่งบนเสื่อ",
}


def words_of(text, encoder):
    """The words of a text, as the pieces of it between word starts."""
    ids, starts, _ = encoder(text)
    words = []
    for number, start in zip(ids, starts, strict=True):
        piece = encoder.tokenizer.id_to_token(int(number)).removeprefix("##").replace("▁", "").replace("Ġ", "")
        words[-1:] = [*words[-1:], piece] if start else [words[-1] + piece]
    return [word for word in words if word]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", "attending heads . rerankers mask ."),
        ("byte-level", "Attending heads . Rerankers mask ."),
        ("Unigram", "Attending heads. Rerankers mask."),
    ],
)
def test_words_are_the_tokenizers_own(kind, words, kinds):
    encoder = Encoder(kinds[kind])
    assert words_of("Attending heads. Rerankers mask.", encoder) == words.split()
    assert len(encoder("Attending heads. Rerankers mask.").ids) > len(words.split())


def test_in_scripts_without_spaces_every_token_is_a_word_and_latin_words_among_them_stay_whole(sentencepiece, bert):
    japanese = words_of(LANGUAGES["ja"], Encoder(sentencepiece))  # SentencePiece itself takes the whole text for a word
    assert japanese == list(LANGUAGES["ja"])
    words = words_of(LANGUAGES["zh"], Encoder(bert, "zh"))
    assert words[:6] == list("北京是中国的")
    assert "bert" in words
    assert len(Encoder(bert)("bert").ids) > 1


def test_a_named_segmenter_decides_what_a_word_is(bert):
    dictionary = ["北京", "中国", "首都", "历史", "学校"]

    def segment(text):
        while text:
            word = next((word for word in dictionary if text.startswith(word)), text[0])
            yield word
            text = text[len(word) :]

    words = words_of("北京是中国的首都。", Encoder(bert, "zh", segment))
    assert words == ["北京", "是", "中国", "的", "首都", "。"]
    with pytest.raises(ValueError, match="'天津', which is not next in '北京'"):
        Encoder(bert, "zh", lambda text: ["天津"])("北京")


@pytest.mark.parametrize("change", ["text.lower()", *(f"unicodedata.normalize({form!r}, text)" for form in FORMS)])
def test_a_segmenter_that_changes_texts_is_refused_before_any_work(change, own_modules):
    (own_modules / "cutter.py").write_text(f"import unicodedata\ndef cut(text):\n    return {change}.split()\n")
    with pytest.raises(ValueError, match=r"--word-segmenter cutter:cut: .* which is not next in"):
        Blocks(word_segmenter="cutter:cut")


@pytest.mark.parametrize(("code", "error"), [("1 / 0", "ZeroDivisionError"), ("def cut(", "was never closed")])
def test_a_segmenter_that_fails_is_said_in_one_line(code, error, own_modules):
    (own_modules / "cutter.py").write_text(code)
    with pytest.raises(ValueError, match=rf"--word-segmenter cutter:cut: .*({error}|division by zero)"):
        Blocks(word_segmenter="cutter:cut")


def test_a_segmenter_that_changes_a_text_later_is_said_with_its_place(own_modules, store, small_units, capsys):
    (own_modules / "cutter.py").write_text("def cut(text):\n    return text.replace('odd', 'even').split()\n")
    source = write_jsonl(own_modules / "a.jsonl", [*make_documents(60), "What an odd text."])
    error = refused(capsys, source, store / "tokenizer", own_modules / "out", "--word-segmenter", "cutter:cut")
    said = r"a.jsonl, from line or row (\d+) on: the word segmenter gave 'even', .* 'What an odd text.'"
    line = int(re.search(said, error)[1])
    assert 1 < line <= 61


@pytest.mark.parametrize(("language", "sentences"), [("zh", 4), ("ja", 3), ("ar", 3), ("he", 3)])
def test_sentences_end_where_they_do_in_languages_without_spaces_or_from_right_to_left(language, sentences):
    text = LANGUAGES[language]
    bounds = [0, *sentence_bounds(text, language)]
    found = [text[begin:end].strip() for begin, end in itertools.pairwise(bounds)]
    assert len(found) == sentences
    assert all(sentence[-1] in "。!?؟.!" for sentence in found)
    assert "".join(found).replace(" ", "") == text.replace(" ", "")


@pytest.fixture(scope="module")
def bert(store):
    """The store's WordPiece tokenizer with some Chinese characters, letters and pieces of words."""
    backend = AutoTokenizer.from_pretrained(store / "tokenizer").backend_tokenizer
    vocabulary = backend.get_vocab()
    letters = "".join(LANGUAGES.values()).lower() + "abcdefghijklmnopqrstuvwxyz0123456789"
    for piece in [*letters, *("##" + letter for letter in letters)]:
        vocabulary.setdefault(piece, len(vocabulary))
    backend.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    return backend


def all_text(tokenizer):
    """The same, but it does not look for special tokens in a text."""
    same = Tokenizer.from_str(tokenizer.to_str())
    same.encode_special_tokens = True
    return same


@pytest.fixture(scope="module")
def kinds(bert, roberta, sentencepiece):
    """Tokenizers by kind, with the special tokens of each."""
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "the": 3, "word": 4, "[": 5, "MASK": 6, "]": 7}
    found = {"bert": bert, "byte-level": AutoTokenizer.from_pretrained(roberta).backend_tokenizer}
    for name, model in (
        ("WordPiece between spaces", models.WordPiece(words, unk_token="[UNK]")),
        ("word by word", models.WordLevel(words, unk_token="[UNK]")),
        ("BPE of whole words", models.BPE(words, [], unk_token="[UNK]", ignore_merges=True)),
    ):
        found[name] = Tokenizer(model)
        found[name].pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        found[name].add_special_tokens(["[PAD]", "[UNK]", "[MASK]", "[CLS]"])  # the last is no word of the model
    unigram = json.loads(sentencepiece.to_str())
    unigram["model"]["vocab"] += [["</s>", 0.0], ["▁<s>", 0.0], ["<mask>", 0.0]]
    spelled = Tokenizer(models.BPE(unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=80, show_progress=False)
    spelled.train_from_iterator(["the <s> word</s> <mask> masks , word"] * 50, trainer)  # its merges spell them
    assert {"<s>", "<mask>"} <= spelled.get_vocab().keys()
    spelled.add_special_tokens(["<s>", "</s>", "<mask>"])
    found["BPE that spells them"] = spelled
    found["Unigram"] = Tokenizer.from_str(json.dumps(unigram))
    found["Unigram"].add_special_tokens(["</s>", "▁<s>", "<mask>", "<cls>"])
    return found


KINDS = ["bert", "byte-level", "WordPiece between spaces", "word by word", "BPE of whole words"]
KINDS += ["BPE that spells them", "Unigram"]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_a_text_spells_out_are_text_and_are_counted(kind, kinds):
    tokenizer = kinds[kind]
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    unknown = {number for content, number in special.items() if "unk" in content.lower()}
    assert len(special) >= 4
    for content in special:
        text = f"the {content} word{content} {content}"
        rows, counts = cut_documents([document(text)], Encoder(tokenizer), Blocks(validation_fraction=0))
        (ids,) = rows["train"].tokens
        assert not {*ids.tolist()} & {*special.values()} - unknown, text
        assert len(ids) >= 3
        assert counts["special_tokens_as_text"] == 3
    plain = Encoder(tokenizer)("the word, masks")
    assert plain.ids.tolist() == tokenizer.encode("the word, masks", add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_that_are_not_special_stay_the_tokens_that_they_are(kind, kinds):
    """Between special ones too, as ModernBERT has them."""
    tokenizer = Tokenizer.from_str(kinds[kind].to_str())
    tokenizer.add_tokens(["covid-19"])
    tokenizer.add_special_tokens(["[X1]", "[X2]"])
    tokenizer.add_tokens(["[unused0]", "New York"])
    encoder = Encoder(tokenizer)
    for token in ("covid-19", "[unused0]", "New York"):
        text = f"the {token} word"
        assert tokenizer.token_to_id(token) in encoder(text).ids
        assert encoder(text).ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.n_ids == 1 + max(tokenizer.get_vocab().values()) >= kinds[kind].get_vocab_size() + 5


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
LLAMA = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, SPACES]}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "splitter"),
    [
        (LLAMA, None),
        (LLAMA, {"type": "Sequence", "pretokenizers": []}),
        (LLAMA, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}),
        (None, METASPACE),
        (None, {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, METASPACE]}),
    ],
    ids=["Llama", "of no parts", "Gemma", "Metaspace", "digits"],
)
def test_words_of_a_tokenizer_that_keeps_spaces_are_those_between_spaces(normalizer, splitter, sentencepiece):
    """To it a text is one word."""
    changed = {"pre_tokenizer": splitter, "normalizer": normalizer}
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(sentencepiece.to_str()) | changed))
    text = "Attending heads. Ranking masks."
    assert {*tokenizer.encode(text, add_special_tokens=False).word_ids} == {0}
    assert words_of(text, Encoder(tokenizer)) == text.split()


def test_words_of_a_wordpiece_tokenizer_without_a_prefix_of_continuing_pieces_are_those_of_the_text(bert):
    words = {piece: number for piece, number in bert.get_vocab().items() if not piece.startswith("##")}
    tokenizer = Tokenizer.from_str(bert.to_str())
    tokenizer.model = models.WordPiece(words, unk_token="[UNK]", continuing_subword_prefix="")
    assert words_of("Attending heads.", Encoder(tokenizer)) == ["attending", "heads", "."]


@pytest.mark.parametrize("text", ["The caf\u00e9 cat sat on the mat. ", "\u00e9 ", "\u65e5\u672c ", " \u00e9  \n "])
def test_text_may_end_in_a_space(text, kinds):
    for tokenizer in kinds.values():
        ids, starts, ends = Encoder(tokenizer)(text)
        assert len(ids) == len(starts)
        assert not ends or ends[-1] == len(ids)


def test_a_special_token_that_is_sought_in_normalized_text_is_text_too(bert):
    tokenizer = Tokenizer.from_str(bert.to_str())
    tokenizer.add_special_tokens([AddedToken("<ent>", normalized=True)])
    ids = Encoder(tokenizer)("the <ent> word").ids
    assert tokenizer.token_to_id("<ent>") not in ids
    assert len(ids) > 3


@pytest.mark.parametrize(("added", "text"), [("mat. The", "A mat. The cat."), ("\n\n", "A cat. \n\n A mat.")])
def test_an_added_token_may_go_across_the_end_of_a_sentence(added, text, bert):
    tokenizer = Tokenizer.from_str(bert.to_str())
    tokenizer.add_tokens([added])
    encoded = Encoder(tokenizer)(text)
    assert encoded.ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.token_to_id(added) in encoded.ids


@pytest.mark.parametrize("space", "\u00a0\u3000\u2028\x85")
@pytest.mark.parametrize("language", ["en", "th", "te"])
def test_no_space_makes_the_sentence_splitter_panic(space, language):
    text = f"We chose plan B{space}. It worked. \u00e9{space}A{space}. Yes."
    bounds = sentence_bounds(text, language)
    assert bounds[-1] == len(text)
    assert bounds == sorted(bounds)


def test_where_the_sentence_splitter_panics_lines_are_sentences(monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(language, text):
        raise PanicException

    monkeypatch.setattr("sentencex.get_sentence_boundaries", panics)
    assert sentence_bounds("One. Two.\nThree.", "en") == [10, 16]


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
def test_the_bytes_of_a_character_are_one_word_of_a_byte_level_tokenizer(language, kinds):
    text, encoder = LANGUAGES[language], Encoder(kinds["byte-level"], language)
    ids, starts, _ = encoder(text)
    places = np.array(encoder.tokenizer.encode(text, add_special_tokens=False).offsets)
    assert len(ids) > 2 * len(text)  # it was trained on English
    begins = places[starts, 0].tolist()
    assert len({*begins}) == len(begins)  # no two words begin in one character
    alone = [number for number, character in enumerate(text) if unspaced(character)[0]]
    assert {*alone} <= {*begins}
    if language == "zh":
        assert text.index("BERT") + 1 not in begins


def test_a_token_of_bytes_of_two_characters_begins_no_word_between_them():
    offsets = np.array([[0, 1], [0, 2], [1, 2], [2, 3]])  # the second has the end of one, and the start of another
    assert word_starts("吾輩は", np.arange(4), offsets, None).tolist() == [True, False, False, True]
    assert word_starts("吾輩は", np.zeros(4), offsets, list).tolist() == [True, False, False, True]


TEXT = st.text(st.characters(codec="utf-8"), max_size=200)
PARTS = [*make_documents(5), *LANGUAGES.values(), "\n\n", " ", "é", "e\u0301", "[SEP]", "x.y?z", "がぎ", "\u200b"]
PROSE = st.lists(st.sampled_from(PARTS)).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXT | PROSE)
@pytest.mark.slow
def test_sentence_by_sentence_gives_what_the_whole_text_gives(bert, text):
    encoder = Encoder(bert)
    assert encoder.by_sentence
    assert_same(encoder.sentence_by_sentence(text), encoder.as_a_whole(text))


@settings(max_examples=200, deadline=None)
@given(TEXT | PROSE)
def test_rows_put_together_are_the_tokenizers_tokens_whatever_the_text(bert, sentencepiece, text):
    for tokenizer in (bert, sentencepiece):
        rows, counts = cut_documents([document(text)], Encoder(tokenizer), Blocks(max_length=12, validation_fraction=0))
        tokens = [number for part in rows["train"].tokens for number in part.tolist()]
        assert tokens == all_text(tokenizer).encode(text, add_special_tokens=False).ids
        assert counts["tokens_kept"] == len(tokens) == sum(map(len, rows["train"].tokens))
        assert all(0 < length <= 10 for length in map(len, rows["train"].tokens))
        assert counts["empty"] == (not tokens)


def test_a_very_long_text_is_tokenized_in_pieces_with_the_same_tokens(bert, sentencepiece, monkeypatch):
    text = " ".join(make_documents(30))
    for tokenizer in (bert, sentencepiece):
        whole = Encoder(tokenizer).as_a_whole(text)
        with monkeypatch.context() as patch:
            patch.setattr("condenser.corpus.encoding.PIECE", 100)
            assert_same(Encoder(tokenizer).as_a_whole(text), whole)


def assert_same(one, other):
    assert [*map(list, one)] == [*map(list, other)]


def test_spans_come_from_documents_with_two_or_more_and_the_others_are_counted(bert):
    texts = ["Short.", *make_documents(40, seed=2)]
    blocks = Blocks(kind="spans", max_length=20, validation_fraction=0.0)
    rows, counts = cut_documents([document(text) for text in texts], Encoder(bert), blocks)
    spans = Counter(rows["train"].documents)
    assert min(spans.values()) >= 2
    assert len(spans) == rows["train"].n_documents == len(texts) - counts["too_short"]
    assert counts["too_short"] > 0
    n_tokens = sum(len(Encoder(bert)(text).ids) for text in texts)
    assert counts["tokens_kept"] + counts["tokens_dropped"] == n_tokens


def test_rows_shorter_than_the_minimum_are_dropped_and_counted(bert):
    documents = [document(text) for text in make_documents(50)]
    rows, counts = cut_documents(documents, Encoder(bert), Blocks(max_length=20, min_length=6, validation_fraction=0.0))
    assert min(map(len, rows["train"].tokens)) >= 6
    assert counts["rows_dropped"] > 0
    assert len(np.concatenate(rows["train"].tokens)) == counts["tokens_kept"]
