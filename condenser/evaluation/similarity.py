"""Semantic textual similarity (STS): sentence pairs with human scores, how an encoder's cosines follow them, and how
its vectors lie on the sphere.

Files of pairs are tab- or comma-separated or JSON lines, plain or compressed, with one of these layouts:

    named columns         score (similarity, relatedness_score, label, ...), sentence1, sentence2 (sentence_A, ...)
    the STS benchmark's   no header; the score is the 5th column, the sentences are the 6th and the 7th
    three columns         no header; the score is the first or the last

The first line tells what separates columns, not the file's name: the STS benchmark's .csv files have tabs. Beside tabs
quotes have no meaning, as in the published STS files.

The similarity is the cosine whatever the encoder searches with, as in SentEval and MTEB, so that numbers compare with
published ones. Alignment and uniformity are those of Wang & Isola, "Understanding Contrastive Representation Learning
through Alignment and Uniformity on the Hypersphere" (2020), taken on STS as in SimCSE; lower is better for both.
"""

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from condenser.corpus.readers import COMPRESSED
from condenser.data.hashing import permuted
from condenser.evaluation.encoders import Encoder, Kind, encoded
from condenser.evaluation.finetuning import Tuning, is_held_out
from condenser.evaluation.retrieval import json_object, numbered_lines
from condenser.evaluation.search import Measured

SUFFIXES = (".tsv", ".csv", ".txt", ".jsonl", ".json")
SCORES = ("relatednessscore", "relatedness", "similarityscore", "similarity", "score", "goldscore", "gold", "label")
SENTENCES = [(word + a, word + b) for word in ("sentence", "sent", "text", "s") for a, b in ("12", "ab")]
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE)
POSITIVE = 0.8  # of the range of the scores, from where on a pair counts as positive: 4 on STS's 0 to 5
UNIFORMITY_SENTENCES = 5_000  # compared with each other in 100 MB


@dataclass(frozen=True)
class Pairs:
    name: str
    first: list[str]
    second: list[str]
    scores: np.ndarray  # [N], on the file's scale

    @cached_property
    def fingerprint(self) -> str:
        content = (self.name, self.first, self.second, self.scores.tolist())
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @cached_property
    def sentences(self) -> list[str]:
        return list(dict.fromkeys(self.first + self.second))

    def part(self, chosen: np.ndarray) -> "Pairs":
        """Those that a mask [N] chooses."""
        first, second = (list(itertools.compress(side, chosen)) for side in (self.first, self.second))
        return Pairs(self.name, first, second, self.scores[chosen])


@dataclass(frozen=True)
class Similarity:
    """What is measured on ``test``; fine-tuning trains on ``train``."""

    name: str
    test: Pairs
    train: Pairs | None

    kind: ClassVar = "similarity"
    texts_are: ClassVar[Kind] = "sentence"
    metrics: ClassVar = ("spearman", "pearson", "alignment", "uniformity")

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.test.fingerprint}{self.train.fingerprint if self.train else ''}"

    @property
    def trains(self) -> bool:
        return self.train is not None

    @property
    def n_train(self) -> int:
        return len(self.train.scores) if self.train else 0

    def texts(self) -> list[str]:
        return (self.train or self.test).sentences

    def held_out(self) -> "Similarity":
        """A tenth of the training pairs is scored, the others are trained on."""
        assert self.train is not None
        held = np.array([is_held_out(text) for text in self.train.first])
        scored, trained = self.train.part(held), self.train.part(~held)
        if min(len(set(scored.scores)), len(set(trained.scores))) < 2:
            raise ValueError(f"{self.name}: {self.n_train} training pairs are too few to choose a learning rate by")
        return Similarity(self.name, scored, trained)

    def examples(self, tuning: Tuning) -> dict[str, list[Any]]:
        """The columns that sentence-transformers' losses of pairs train on: sentences, and scores scaled to 0 to 1. Of
        two sizes the smaller one's pairs are among the larger one's."""
        assert self.train is not None
        scores = self.train.scores
        chosen = permuted(np.arange(tuning.train_size or len(scores)), len(scores), tuning.seed)
        return {
            "sentence1": [self.train.first[i] for i in chosen],
            "sentence2": [self.train.second[i] for i in chosen],
            "score": ((scores[chosen] - scores.min()) / (scores.max() - scores.min())).tolist(),
        }

    def measure(self, encoder: Encoder, query: str | None = None) -> Measured:
        """Correlations, which are None for an encoder that gives all pairs one cosine, alignment and uniformity."""
        from scipy.stats import pearsonr, spearmanr

        pairs, scores = self.test, self.test.scores
        vectors = encoded(encoder, pairs.sentences).cpu().numpy().astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        row = {sentence: number for number, sentence in enumerate(pairs.sentences)}
        first, second = (vectors[[row[sentence] for sentence in side]] for side in (pairs.first, pairs.second))
        cosines = (first * second).sum(axis=1)
        positive = scores >= scores.min() + POSITIVE * (scores.max() - scores.min())
        found = {"spearman": spearmanr(cosines, scores).statistic, "pearson": pearsonr(cosines, scores).statistic}
        metrics = {name: None if np.isnan(value) else float(value) for name, value in found.items()} | {
            "similarity": "cosine",
            "alignment": float(((first - second)[positive] ** 2).sum(axis=1).mean()),
            "uniformity": uniformity(vectors),
            "pairs": len(scores),
            "positive_pairs": int(positive.sum()),
        }
        both = zip(cosines.tolist(), scores.tolist(), strict=True)
        return Measured(metrics, {str(i): {"cosine": cosine, "score": score} for i, (cosine, score) in enumerate(both)})


def read_similarity(path: Path) -> Similarity:
    """Test and training pairs: of a file; or of a folder where one file has the word "test" in its name and at most one
    "train", else ValueError"""
    if not path.is_dir():
        test = read_pairs(path)
        return Similarity(test.name, test, None)
    files = sorted(file for file in path.glob("[!.]*") if kind(file) in SUFFIXES)
    words = {file: re.split("[^a-z]+", file.name.lower()) for file in files}
    tests, trains = ([file for file in files if split in words[file]] for split in ("test", "train"))
    if len(tests) != 1 or len(trains) > 1:
        raise ValueError(
            f"{path}: one file of sentence pairs must have the word 'test' in its name, and at most one 'train'; there "
            f"is {', '.join(file.name for file in files) or 'none'}. Or give a file instead of the folder"
        )
    return Similarity(path.resolve().name, read_pairs(tests[0]), read_pairs(trains[0]) if trains else None)


def read_pairs(path: Path) -> Pairs:
    """A file in one of the layouts above; ValueError for another, a broken line, or scores that do not differ."""
    if kind(path) not in SUFFIXES or not path.is_file():
        formats = f"{', '.join(SUFFIXES)}, or {', '.join(COMPRESSED)} of it"
        raise ValueError(f"no sentence pairs at {path}: a file is needed ({formats}), or a folder of them")
    rows = list(table_rows(path))
    columns, width, header = layout(path, rows[0][1] if rows else [])
    first, second, scores = [], [], []
    for number, row in rows[header:]:
        if width and len(row) != width:
            raise ValueError(f"{path}, line {number}: {len(row)} columns, not {width} as in the first line: {row}")
        try:
            score, one, two = (row[column] for column in columns)
            scores.append(float(score))
            first.append(one.strip())
            second.append(two.strip())
        except (LookupError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{path}, line {number}: not two sentences and a score: {row}") from None
        if not (np.isfinite(scores[-1]) and first[-1] and second[-1]):
            raise ValueError(f"{path}, line {number}: an empty sentence, or a score that is not finite: {row}")
    both = zip(first, second, strict=True)
    if len({frozenset(pair) if pair[0] != pair[1] else "alike" for pair in both}) < 2:
        raise ValueError(f"{path}: its {len(scores)} pairs do not differ: all have the same cosine")
    if len(set(scores)) < 2:
        raise ValueError(f"{path}: the scores of its {len(scores)} pairs do not differ: nothing correlates with them")
    return Pairs(path.name.split(kind(path))[0], first, second, np.array(scores))


def kind(path: Path) -> str:
    """The suffix, without that of a compression."""
    return Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.lower()


def layout(path: Path, row: list[Any]) -> tuple[tuple[int, int, int], int | None, bool]:
    """-> columns of score and sentences, the number of columns if it is fixed, whether the row is a header"""
    names = [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in row]
    for one, two in SENTENCES:
        if one in names and two in names:
            if score := next((name for name in SCORES if name in names), None):
                return (names.index(score), names.index(one), names.index(two)), len(row), True
            raise ValueError(f"{path}: no column of scores (such as {', '.join(SCORES)}) among {row}")
    if len(row) == 3 and (NUMBER.fullmatch(row[0]) or NUMBER.fullmatch(row[2])):
        return ((0, 1, 2) if NUMBER.fullmatch(row[0]) else (2, 0, 1)), 3, False
    if len(row) >= 7 and NUMBER.fullmatch(row[4]):
        return (4, 5, 6), None, False
    raise ValueError(
        f"{path}: the first line must name its columns (score, sentence1, sentence2), or be two sentences and a score "
        f"alone or as columns 5 to 7, not {row}"
    )


def table_rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """-> the numbers of lines, and their columns"""
    lines = list(numbered_lines(path))
    filled = [(number, line) for number, line in lines if line.strip()]
    if kind(path) in (".jsonl", ".json"):
        rows = [(number, json_object(f"{path}, line {number}", line)) for number, line in filled]
        names = list(rows[0][1]) if rows else []  # of the first object's fields
        yield 1, names
        yield from ((number, [fields.get(name) for name in names]) for number, fields in rows)
    elif filled and "\t" in filled[0][1]:
        yield from ((number, line.split("\t")) for number, line in filled)
    else:
        reader = csv.reader((f"{line}\n" for _, line in lines), strict=True)
        try:
            yield from ((reader.line_num, row) for row in reader if row)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not comma-separated: {error}") from None


def uniformity(vectors: np.ndarray) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of unit vectors [N, D]; of many, over a fixed sample's."""
    from scipy.spatial.distance import pdist

    n = len(vectors)
    if n > UNIFORMITY_SENTENCES:
        vectors = vectors[permuted(np.arange(UNIFORMITY_SENTENCES), n, 0)]
    return float(np.log(np.exp(-2 * pdist(vectors, "sqeuclidean")).mean()))
