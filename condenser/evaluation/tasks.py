"""What encoders are measured on. Each task reads its data, knows what it can train on, and measures an encoder."""

import itertools
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from condenser.data.store import read_manifest, tokenizer_hash
from condenser.evaluation.encoders import backbone
from condenser.evaluation.finetuning import Tuning, question_examples
from condenser.evaluation.pairs import SimilarityTask, read_similarity
from condenser.evaluation.probes import probe_store
from condenser.evaluation.retrieval import Collection, read_collection
from condenser.evaluation.search import METRICS, Index, Values, bm25_search, dense_search, means, score_queries
from condenser.evaluation.similarity import cosent_examples, similarity_metrics

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXAMPLE = "\N{NULL}example"  # id of --query among the queries of a collection
EXAMPLE_HITS = 5


class Measured(NamedTuple):
    metrics: dict[str, Any]
    values: Values  # of each query or pair, for paired comparisons
    hits: Sequence[dict[str, Any]] = ()  # the first ones for --query


@dataclass(frozen=True)
class Retrieval:
    """Search in a BEIR folder; trains on ``qrels/train.tsv``."""

    collection: Collection
    index: Index = "exact"
    split: str = "test"

    kind: ClassVar = "retrieval"
    metrics: ClassVar = tuple(METRICS)
    loss: ClassVar = "MultipleNegativesRankingLoss"

    @classmethod
    def read(cls, folder: str, index: Index, n_queries: int | None = None, split: str = "test") -> "Retrieval":
        """With ``n_queries`` of the split only, always the same."""
        collection = read_collection(Path(folder), split)
        if n_queries is not None and n_queries < len(collection.queries):
            drawn = random.Random(0).sample(sorted(collection.queries), n_queries)
            queries = {query: collection.queries[query] for query in drawn}
            collection = replace(collection, queries=queries, qrels={query: collection.qrels[query] for query in drawn})
        return cls(collection, index, split)

    @property
    def name(self) -> str:
        return self.collection.name

    @property
    def fingerprint(self) -> str:
        return f"{self.collection.fingerprint} {self.index}"

    @property
    def trains(self) -> bool:
        return bool(self.collection.train_pairs) and self.split != "train"

    def examples(self, tuning: Tuning) -> dict[str, list]:
        return question_examples(self.collection, tuning)

    def texts(self) -> list[str]:
        return list(self.collection.documents.values())

    def measure(self, encoder: "SentenceTransformer | None", query: str | None) -> Measured:
        """Without an encoder, BM25."""
        collection = self.collection
        asked = collection.queries | ({EXAMPLE: query} if query else {})
        if encoder is None:
            found = bm25_search(collection.documents, asked)
        else:
            found = dense_search(encoder, collection.documents, asked, index=self.index)
        values = score_queries(found, collection.qrels)
        best = itertools.islice(found.get(EXAMPLE, {}).items(), EXAMPLE_HITS)
        hits = [
            {"rank": rank, "id": i, "score": value, "text": textwrap.shorten(collection.documents[i], 300)}
            for rank, (i, value) in enumerate(best, start=1)
        ]
        about = {"split": self.split, "queries": len(collection.queries), "documents": len(collection.documents)}
        return Measured(means(values) | about, values, hits)


@dataclass(frozen=True)
class Similarity:
    """Sentence pairs with human scores (STS); trains on the training split beside them."""

    pairs: SimilarityTask

    kind: ClassVar = "similarity"
    metrics: ClassVar = ("spearman", "pearson", "alignment", "uniformity")
    loss: ClassVar = "CoSENTLoss"

    @classmethod
    def read(cls, path: str) -> "Similarity":
        return cls(read_similarity(Path(path)))

    @property
    def name(self) -> str:
        return self.pairs.name

    @property
    def fingerprint(self) -> str:
        return self.pairs.test.fingerprint + (self.pairs.train.fingerprint if self.pairs.train else "")

    @property
    def trains(self) -> bool:
        return self.pairs.train is not None

    def examples(self, tuning: Tuning) -> dict[str, list]:
        assert self.pairs.train is not None
        return cosent_examples(self.pairs.train, tuning.train_size, tuning.seed)

    def texts(self) -> list[str]:
        pairs = self.pairs.train or self.pairs.test
        return list(dict.fromkeys(pairs.first + pairs.second))

    def measure(self, encoder: "SentenceTransformer | None", query: str | None) -> Measured:
        assert encoder is not None
        metrics, cosines = similarity_metrics(encoder, self.pairs.test)
        scored = zip(cosines.tolist(), self.pairs.test.scores.tolist(), strict=True)
        values = {str(number): {"cosine": cosine, "score": score} for number, (cosine, score) in enumerate(scored)}
        return Measured(metrics, values)


@dataclass(frozen=True)
class Attention:
    """How widely [CLS] attends, by layer, on rows of a token store's validation split."""

    store: Path
    n_sequences: int = 256

    kind: ClassVar = "attention"
    trains: ClassVar = False

    @property
    def name(self) -> str:
        return self.store.name

    @cached_property
    def fingerprint(self) -> str:
        return f"{read_manifest(self.store)['splits']['validation']} {self.n_sequences}"

    def check_tokenizer(self, encoder: "SentenceTransformer") -> None:
        if read_manifest(self.store)["tokenizer"]["hash"] != tokenizer_hash(encoder.tokenizer):
            raise ValueError(f"--attention {self.store}: the store was made with another tokenizer than the encoder's")

    def measure(self, encoder: "SentenceTransformer | None", query: str | None) -> Measured:
        assert encoder is not None
        found = probe_store(None, backbone(encoder), self.store, self.n_sequences)
        return Measured(found, {})


Task = Retrieval | Similarity | Attention
