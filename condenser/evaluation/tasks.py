"""What encoders are measured on. Each task reads its data, knows what it can train on, and measures an encoder."""

import hashlib
import itertools
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from condenser.data.store import TokenStore, read_manifest, tokenizer_hash
from condenser.evaluation.encoders import Encoder, Kind, backbone
from condenser.evaluation.finetuning import Tuning, check_size, question_examples
from condenser.evaluation.probes import probe_store
from condenser.evaluation.retrieval import Collection, read_collection
from condenser.evaluation.search import METRICS, Run, Values, bm25_search, dense_search, means, score_queries
from condenser.evaluation.similarity import Pairs, pair_examples, read_similarity, similarity_metrics

EXAMPLE = "\N{NULL}example"  # id of --query among the queries of a collection
EXAMPLE_HITS = 5
UNSEEN = "ndcg@10_unseen"  # on queries whose relevant documents are none of training's
HELD_OUT = 0.1  # of the training split, to choose settings of fine-tuning by
HELD_OUT_QUERIES = 500  # at most


class Measured(NamedTuple):
    metrics: dict[str, Any]
    values: Values  # of each query or pair, for paired comparisons
    hits: Sequence[dict[str, Any]] = ()  # the first ones for --query


def is_held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < HELD_OUT * 2**64


@dataclass(frozen=True)
class Retrieval:
    """Search in a BEIR folder; trains on ``qrels/train.tsv``."""

    name: str
    collection: Collection
    split: str = "test"

    kind: ClassVar = "retrieval"
    texts_are: ClassVar[Kind] = "document"
    metrics: ClassVar = (*METRICS, UNSEEN)

    @classmethod
    def read(cls, folder: str, n_queries: int | None = None, split: str = "test") -> "Retrieval":
        """With ``n_queries`` of the split only, always the same."""
        collection = read_collection(Path(folder), split)
        if n_queries is not None and n_queries < len(collection.queries):
            drawn = random.Random(0).sample(sorted(collection.queries), n_queries)
            queries = {query: collection.queries[query] for query in drawn}
            collection = replace(collection, queries=queries, qrels={query: collection.qrels[query] for query in drawn})
        return cls(collection.name, collection, split)

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.collection.fingerprint}"

    @property
    def trains(self) -> bool:
        return bool(self.collection.train_pairs) and self.split != "train"

    @property
    def n_train(self) -> int:
        return len(self.collection.train_qrels)

    def examples(self, tuning: Tuning) -> dict[str, list]:
        return question_examples(self.collection, tuning)

    def held_out(self) -> "Retrieval":
        """A tenth of the training questions is scored, the others are trained on; those with one relevant document are
        on one side."""
        whole = self.collection
        held = {i for i in whole.train_qrels if is_held_out(min(whole.relevant(i, whole.train_qrels), default=i))}
        scored = dict(itertools.islice(((i, whole.train_qrels[i]) for i in sorted(held)), HELD_OUT_QUERIES))
        trained = {i: judged for i, judged in whole.train_qrels.items() if i not in held}
        if not scored or len(trained) < 2:
            raise ValueError(f"{self.name}: {self.n_train} training questions are too few to choose a learning rate by")
        asked = {i: whole.train_queries[i] for i in scored}
        return replace(self, collection=replace(whole, queries=asked, qrels=scored, train_qrels=trained))

    def texts(self) -> list[str]:
        return list(self.collection.documents.values())

    def measure(self, encoder: Encoder, query: str | None = None) -> Measured:
        collection = self.collection
        asked = collection.queries | ({EXAMPLE: query} if query else {})
        return self.scored(dense_search(encoder, collection.documents, asked))

    def measure_bm25(self, reader: Encoder | None) -> Measured:
        return self.scored(bm25_search(self.collection.documents, self.collection.queries, reader=reader))

    def scored(self, found: Run) -> Measured:
        collection = self.collection
        values = score_queries(found, collection.qrels)
        about: dict[str, Any] = {"queries": len(collection.queries), "documents": len(collection.documents)}
        if collection.train_qrels:
            unseen = [query for query in values if query in collection.unseen]
            for query in unseen:
                values[query][UNSEEN] = values[query]["ndcg@10"]
            mean = sum(values[query][UNSEEN] for query in unseen) / len(unseen) if unseen else None
            about |= {UNSEEN: mean, "queries_unseen": len(unseen)}
        best = itertools.islice(found.get(EXAMPLE, {}).items(), EXAMPLE_HITS)
        hits = [
            {"rank": rank, "id": i, "score": value, "text": textwrap.shorten(collection.documents[i], 300)}
            for rank, (i, value) in enumerate(best, start=1)
        ]
        return Measured({"split": self.split} | means(values) | about, values, hits)


@dataclass(frozen=True)
class Similarity:
    """Sentence pairs with human scores (STS); trains on the training split beside them."""

    name: str
    test: Pairs
    train: Pairs | None

    kind: ClassVar = "similarity"
    texts_are: ClassVar[Kind] = "sentence"
    metrics: ClassVar = ("spearman", "pearson", "alignment", "uniformity")

    @classmethod
    def read(cls, path: str) -> "Similarity":
        return cls(*read_similarity(Path(path)))

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.test.fingerprint}{self.train.fingerprint if self.train else ''}"

    @property
    def trains(self) -> bool:
        return self.train is not None

    @property
    def n_train(self) -> int:
        return len(self.train.scores) if self.train else 0

    def examples(self, tuning: Tuning) -> dict[str, list]:
        assert self.train is not None
        return pair_examples(self.train, tuning.train_size, tuning.seed)

    def held_out(self) -> "Similarity":
        """A tenth of the training pairs is scored, the others are trained on."""
        assert self.train is not None
        held = np.array([is_held_out(text) for text in self.train.first])
        scored, trained = self.train.part(held), self.train.part(~held)
        if min(len(set(scored.scores)), len(set(trained.scores))) < 2:
            raise ValueError(f"{self.name}: {self.n_train} training pairs are too few to choose a learning rate by")
        return Similarity(self.name, scored, trained)

    def texts(self) -> list[str]:
        pairs = self.train or self.test
        return list(dict.fromkeys(pairs.first + pairs.second))

    def measure(self, encoder: Encoder, query: str | None = None) -> Measured:
        metrics, cosines = similarity_metrics(encoder, self.test)
        scored = zip(cosines.tolist(), self.test.scores.tolist(), strict=True)
        values = {str(number): {"cosine": cosine, "score": score} for number, (cosine, score) in enumerate(scored)}
        return Measured({"similarity": "cosine"} | metrics, values)


@dataclass(frozen=True)
class Attention:
    """How widely [CLS] attends, by layer, on rows of a token store's validation split."""

    store: Path
    n_sequences: int = 256

    kind: ClassVar = "attention"
    trains: ClassVar = False

    @classmethod
    def read(cls, store: str) -> "Attention":
        if len(TokenStore(store, "validation")) < 2:
            raise ValueError(f"--attention {store}: its validation split has fewer than two rows")
        return cls(Path(store))

    @property
    def name(self) -> str:
        return self.store.name

    @cached_property
    def fingerprint(self) -> str:
        return f"{self.name} {read_manifest(self.store)['splits']['validation']} {self.n_sequences}"

    def check_tokenizer(self, encoder: Encoder) -> None:
        if read_manifest(self.store)["tokenizer"]["hash"] != tokenizer_hash(encoder.tokenizer):
            raise ValueError(f"--attention {self.store}: the store was made with another tokenizer than the encoder's")

    def measure(self, encoder: Encoder, query: str | None = None) -> Measured:
        return Measured(probe_store(None, backbone(encoder), self.store, self.n_sequences), {})


Trainable = Retrieval | Similarity
Task = Trainable | Attention


def read_tasks(
    retrieval: Sequence[str], similarity: Sequence[str], attention: str | None, queries: int | None, split: str
) -> list[Task]:
    """What is to be measured on; of one kind and name each is called by its path, and what is given twice is once."""
    paths = {(kind, Path(path).resolve()): path for kind, given in ((0, retrieval), (1, similarity)) for path in given}
    read: list[Trainable] = [
        Similarity.read(path) if is_pairs else Retrieval.read(path, queries, split)
        for (is_pairs, _), path in paths.items()
    ]
    names = [(task.kind, task.name) for task in read]
    tasks: list[Task] = [
        task if names.count((task.kind, task.name)) == 1 else replace(task, name=path)
        for task, path in zip(read, paths.values(), strict=True)
    ]
    return tasks + ([Attention.read(attention)] if attention else [])


def check_training(tasks: Sequence[Task], tunings: Sequence[Tuning]) -> None:
    """ValueError where there is nothing to train on, or less than is asked for."""
    training = [task for task in tasks if not isinstance(task, Attention) and task.trains]
    if scored := [task.name for task in tasks if isinstance(task, Retrieval) and task.split == "train"]:
        raise ValueError(f"--split train: what {', '.join(scored)} would be trained on is what is scored")
    if not training:
        raise ValueError(
            f"{', '.join(task.name for task in tasks)}: nothing to fine-tune on, such as relevant pairs in "
            "qrels/train.tsv or a train file of sentence pairs"
        )
    kinds = {task.kind for task in training}
    if Retrieval.kind not in kinds and any(each.hard_negatives or each.mini_batch for each in tunings):
        raise ValueError("--hard-negatives and --mini-batch are of retrieval, and no collection here is trained on")
    if Similarity.kind not in kinds and any(each.pair_loss != "cosent" for each in tunings):
        raise ValueError("--pair-losses are of sentence pairs, and none here are trained on")
    for task, tuning in itertools.product(training, tunings):
        check_size(tuning.train_size, task.n_train, f"questions or pairs to train on in {task.name}")
        if isinstance(task, Retrieval) and len({text for _, text in task.collection.train_pairs}) < 2:
            raise ValueError(
                f"{task.name}: its training questions have one passage; to be told apart there must be two"
            )
        if tuning.learning_rate is None:
            task.held_out()
