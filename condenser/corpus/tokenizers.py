"""The tokenizer of a store: loaded from a folder or the hub, or trained on the corpus itself (``train:8192``)."""

import itertools
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from condenser.data.store import MANIFEST, read_manifest, tokenizer_hash
from condenser.data.tokenizers import load_tokenizer

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def store_tokenizer(folder: Path, spec: str, texts: Callable[[], Iterator[str]]) -> None:
    """Give a store its tokenizer, ``spec`` as in `prepare`, and see that it is the same when it goes on, grows or is
    repaired. Raises ValueError for none there, one without [MASK] or [CLS], a bad size, or another."""
    from condenser.data.collate import Vocabulary

    place = folder / "tokenizer"
    known = [load_tokenizer(place)] if place.exists() else []
    if not spec.startswith("train:"):
        known.append(load_tokenizer(spec))
    elif not known:
        known.append(train_wordpiece(spec, texts))
    hashes = {*map(tokenizer_hash, known)}
    if (folder / MANIFEST).is_file():
        hashes.add(read_manifest(folder)["tokenizer"]["hash"])
    if len(hashes) > 1:
        raise ValueError(f"the tokenizer {spec}, or its copy in {folder}, has changed since the store was begun")
    if not place.exists():
        Vocabulary.of(known[0])
        save_tokenizer(known[0], place)


def save_tokenizer(tokenizer: Any, place: Path) -> None:
    """Whole or not at all; another machine that was faster has saved the same one."""
    tokenizer.init_kwargs.pop("local_files_only", None)  # of the environment, not of the tokenizer
    partial = place.with_name(f"tokenizer.{uuid.uuid4().hex[:8]}.partial")
    try:
        tokenizer.save_pretrained(partial)
    except Exception as error:  # the tokenizers library has no kinds of errors
        raise OSError(f"{place} cannot be written: {error}") from error
    try:
        partial.rename(place)
    except OSError:
        shutil.rmtree(partial)


def train_wordpiece(spec: str, texts: Callable[[], Iterator[str]]) -> Any:
    """The same vocabulary every time: the trainer numbers continuing characters (##a) in the order of a hash map, and
    breaks ties by number, so these are given to it first, as if they were special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    size = spec.removeprefix("train:")
    if not re.fullmatch("[0-9]{3,9}", size) or int(size) < 100:
        raise ValueError(f"--tokenizer {spec}: the vocabulary size after 'train:' must be a whole number, at least 100")
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = frequent_characters(map(wordpiece.normalizer.normalize_str, texts()), at_most=int(size) // 4)
    trainer = trainers.WordPieceTrainer(
        vocab_size=int(size),
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    wordpiece.train_from_iterator(texts(), trainer)
    return BertTokenizer(vocab=wordpiece.get_vocab(), model_max_length=512)


def frequent_characters(texts: Iterator[str], at_most: int) -> list[str]:
    """The most frequent characters, up to 99.99 % of all occurrences, in code point order."""
    counts = Counter(itertools.chain.from_iterable(texts))
    for space in filter(str.isspace, [*counts]):
        del counts[space]
    ranked = sorted(counts, key=lambda c: (-counts[c], c))[:at_most]
    covered_before = itertools.accumulate((counts[c] for c in ranked), initial=0)
    enough = 0.9999 * counts.total()
    return sorted(c for c, covered in zip(ranked, covered_before, strict=False) if covered < enough)
