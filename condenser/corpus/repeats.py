"""Documents whose text was there before, to the letter or nearly, and which of them are dropped.

Each document has keys, that of its text and, where they are asked for, those of near-duplicates: 14 of MinHash over
runs of five words, each of eight values. Two texts that share a part J of their runs have one of these in common with
probability 1 - (1 - J^8)^14: 0.92 at J = 0.8, 0.05 at 0.5. A document one of whose keys was there before is a repeat.
"""

from pathlib import Path
from typing import Any

import numpy as np

from condenser.corpus.documents import Document
from condenser.corpus.words import unspaced
from condenser.data.hashing import hash_ints
from condenser.data.store import load_array, save_array

BANDS, VALUES, RUN = 14, 8, 5
ID, TEXT = range(2)  # columns of keys; after them those of near-duplicates


def keys_of(documents: list[Document], near: bool) -> np.ndarray:
    """``[n, 2]``, with those of near-duplicates ``[n, 2 + BANDS]``."""
    keys = np.array([(document.key, document.content) for document in documents], np.uint64).reshape(-1, 2)
    if not near:
        return keys
    from rensa import RMinHash

    texts = (runs_of_words(document.text) for document in documents)
    values = np.array(RMinHash.digests_from_token_sets(texts, BANDS * VALUES, 42), np.uint64)
    values = values.reshape(len(documents), BANDS, VALUES)
    return np.hstack([keys, hash_ints(np.arange(BANDS), *np.moveaxis(values, 2, 0))])


def runs_of_words(text: str) -> list[str]:
    """Of characters, where no spaces are written."""
    if unspaced(text).sum() > len(text) / 4:
        words, between = list("".join(text.split())), ""
    else:
        words, between = text.lower().split(), " "
    return [between.join(words[first : first + RUN]) for first in range(max(1, len(words) - RUN + 1))]


def mark_repeats(keys: list[Path], marks: list[Path]) -> None:
    """Of the units whose ``keys`` these are, in order, note down for the last which of their documents are repeats, in
    one of the files ``marks`` each. Of the keys one column at a time is in memory."""
    shapes = [np.load(path, mmap_mode="r").shape for path in keys]
    is_repeat = np.zeros(sum(n for n, _ in shapes), bool)
    for column in range(TEXT, shapes[0][1]):
        _, first = np.unique(np.concatenate([load_array(path)[:, column] for path in keys]), return_index=True)
        is_first = np.zeros(len(is_repeat), bool)
        is_first[first] = True
        is_repeat |= ~is_first
    of_units = np.split(is_repeat, np.cumsum([n for n, _ in shapes])[:-1])
    for path, repeats in zip(marks, of_units[len(keys) - len(marks) :], strict=True):
        save_array(path, repeats)


def repeated(files: list[Path], column: int) -> int:
    """How many of the keys in a column of all files were there before; memory is bounded by taking a part of them at a
    time."""
    parts = 1 + sum(path.stat().st_size for path in files) // 2**29
    n_repeated = 0
    for part in range(parts):
        of_files: Any = (load_array(path)[:, column] for path in files)
        hashes = np.concatenate([keys[keys % np.uint64(parts) == part] for keys in of_files])
        n_repeated += len(hashes) - len(np.unique(hashes))
    return n_repeated
