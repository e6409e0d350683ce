"""What is measured besides retrieval and similarity, and reading all of it.

A task knows its name, its fingerprint and what it can be trained on, and measures an encoder."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from condenser.data.store import TokenStore, read_manifest, tokenizer_hash
from condenser.evaluation.encoders import Encoder, backbone
from condenser.evaluation.finetuning import Tuning
from condenser.evaluation.probes import probe_store
from condenser.evaluation.retrieval import Collection, read_collection
from condenser.evaluation.search import Measured
from condenser.evaluation.similarity import Similarity, read_similarity

SEQUENCES = 256  # of the split, whose attention is looked at


@dataclass(frozen=True)
class Attention:
    """How widely [CLS] attends, by layer, on rows of a token store's validation split."""

    store: Path

    kind: ClassVar = "attention"
    trains: ClassVar = False

    def __post_init__(self) -> None:
        if len(TokenStore(self.store, "validation")) < 2:
            raise ValueError(f"--attention {self.store}: its validation split has fewer than two rows")

    @property
    def name(self) -> str:
        return self.store.name

    @cached_property
    def fingerprint(self) -> str:
        return f"{self.name} {read_manifest(self.store)['splits']['validation']} {SEQUENCES}"

    def check_tokenizer(self, encoder: Encoder) -> None:
        if read_manifest(self.store)["tokenizer"]["hash"] != tokenizer_hash(encoder.tokenizer):
            raise ValueError(f"--attention {self.store}: the store was made with another tokenizer than the encoder's")

    def measure(self, encoder: Encoder, query: str | None = None) -> Measured:
        return Measured(probe_store(None, backbone(encoder), self.store, SEQUENCES), {})


Trainable = Collection | Similarity
Task = Trainable | Attention


def read_tasks(
    retrieval: Sequence[str], similarity: Sequence[str], attention: str | None, queries: int | None, split: str
) -> list[Task]:
    """What is to be measured on; of one kind and name each is called by its path, and what is given twice is once."""
    collections, pairs = ({Path(path).resolve(): path for path in given}.values() for given in (retrieval, similarity))
    read: list[tuple[str, Trainable]] = [(path, read_collection(Path(path), split, queries)) for path in collections]
    read += [(path, read_similarity(Path(path))) for path in pairs]
    names = [(task.kind, task.name) for _, task in read]
    tasks: list[Task] = [
        replace(task, name=path) if names.count((task.kind, task.name)) > 1 else task for path, task in read
    ]
    return tasks + ([Attention(Path(attention))] if attention else [])


def check_training(tasks: Sequence[Task], tunings: Sequence[Tuning]) -> None:
    """ValueError where there is nothing to train on, or less than is asked for."""
    training = [task for task in tasks if not isinstance(task, Attention) and task.trains]
    if scored := [task.name for task in tasks if isinstance(task, Collection) and task.split == "train"]:
        raise ValueError(f"--split train: what {', '.join(scored)} would be trained on is what is scored")
    if not training:
        raise ValueError(
            f"{', '.join(task.name for task in tasks)}: nothing to fine-tune on, such as relevant pairs in "
            "qrels/train.tsv or a train file of sentence pairs"
        )
    kinds = {task.kind for task in training}
    if Collection.kind not in kinds and any(each.hard_negatives or each.mini_batch for each in tunings):
        raise ValueError("--hard-negatives and --mini-batch are of retrieval, and no collection here is trained on")
    if Similarity.kind not in kinds and any(each.pair_loss != "cosent" for each in tunings):
        raise ValueError("--pair-losses are of sentence pairs, and none here are trained on")
    for task, tuning in itertools.product(training, tunings):
        if tuning.train_size is not None and tuning.train_size > task.n_train:
            raise ValueError(
                f"--train-sizes {tuning.train_size}: there are {task.n_train:,} questions or pairs to train on in "
                f"{task.name}"
            )
        if isinstance(task, Collection) and len({text for _, text in task.train_pairs}) < 2:
            raise ValueError(
                f"{task.name}: its training questions have one passage; to be told apart there must be two"
            )
        if tuning.learning_rate is None:
            task.held_out()
