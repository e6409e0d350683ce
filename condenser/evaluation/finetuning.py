"""Fine-tuning an encoder before it is evaluated, by sentence-transformers' trainer: AdamW, 10 % warm-up, linear decay,
gradient norm 1, fp32. On a CPU the result is a function of the arguments."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from condenser.data.hashing import permuted
from condenser.evaluation.encoders import backbone
from condenser.evaluation.retrieval import Collection
from condenser.evaluation.search import bm25_search

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch.nn import Module


LENGTH_GROUPS = 4  # with 8, the products of small matrices cost as much as the padding that is saved
LAYER_WEIGHTS_RATE = 1e-2  # of the pooling's few weights of layers, which hardly move at an encoder's rate


@dataclass(frozen=True)
class Tuning:
    """Settings of fine-tuning.

    Args:
        steps: optimizer steps, at most.
        epochs: at most so many passes over the examples; None sets no limit.
        batch_size: examples; a question's other negatives are the passages of the batch.
        learning_rate: its peak.
        hard_negatives: passages beside each relevant one, the best of BM25 that are not judged relevant.
        mini_batch: examples computed at a time, by gradient caching: large batches in little memory; 0 is all.
        train_size: questions, or scored pairs, drawn from the training split; None is all.
        seed: of the draw and the order.
    """

    steps: int = 1000
    epochs: int | None = None
    batch_size: int = 64
    learning_rate: float = 2e-5
    hard_negatives: int = 0
    mini_batch: int = 0
    train_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"finetune-steps": 1, "finetune-epochs": 1, "finetune-batch-size": 2}
        least |= {"hard-negatives": 0, "mini-batch": 0, "train-size": 1}
        for option, value in least.items():
            given = getattr(self, option.removeprefix("finetune-").replace("-", "_"))
            if given is not None and given < value:
                raise ValueError(f"--{option}{'s' * (option == 'train-size')} {given} must be at least {value}")
        if not self.learning_rate > 0:
            raise ValueError(f"--finetune-learning-rate {self.learning_rate} must be positive")

    def n_steps(self, n_examples: int) -> int:
        if self.epochs is None:
            return self.steps
        return min(self.steps, self.epochs * max(1, round(n_examples / self.batch_size)))


def question_examples(collection: Collection, tuning: Tuning) -> dict[str, list[str]]:
    """Columns of questions, relevant passages and hard negatives.

    Raises:
        ValueError: fewer training questions than ``train_size``, or none with so many hard negatives.
    """
    judged = sorted(collection.train_qrels)
    size = tuning.train_size or len(judged)
    if size > len(judged):
        raise ValueError(f"--train-sizes {size}: {collection.name} has {len(judged):,} training questions")
    drawn = permuted(np.arange(size), len(judged), tuning.seed)  # of two sizes the smaller one's are in the larger's
    questions = {judged[i]: collection.train_queries[judged[i]] for i in drawn}
    hits = bm25_search(collection.documents, questions) if tuning.hard_negatives else {}
    names = ["query", "positive", *(f"negative_{n}" for n in range(1, tuning.hard_negatives + 1))]
    rows = []
    for query, question in questions.items():
        relevant = [i for i, grade in collection.train_qrels[query].items() if grade > 0 and i in collection.documents]
        others = [i for i in hits.get(query, {}) if i not in collection.train_qrels[query]][: tuning.hard_negatives]
        if len(others) == tuning.hard_negatives:
            texts = [collection.documents[i] for i in others]
            rows += [(question, collection.documents[i], *texts) for i in relevant]
    if not rows:
        raise ValueError(
            f"--hard-negatives {tuning.hard_negatives}: BM25 finds so many for no question of {collection.name}"
        )
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def fine_tune(encoder: "SentenceTransformer", examples: Mapping[str, list], loss: str, tuning: Tuning) -> None:
    """Train in place.

    Args:
        examples: columns as the loss wants them.
        loss: MultipleNegativesRankingLoss or CoSENTLoss.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from torch.nn import Dropout
    from transformers import PrinterCallback

    # no dropout: its noise is larger than the first differences between an untrained encoder's [CLS] vectors
    backbone(encoder).config.attention_probs_dropout_prob = 0.0
    for module in encoder.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    ranking = loss == "MultipleNegativesRankingLoss"
    weighted = any("layer_weights" in name and weight.requires_grad for name, weight in encoder.named_parameters())
    steps = tuning.n_steps(len(next(iter(examples.values()))))
    # the trainer wants a folder; nothing is kept of it
    with in_length_groups(encoder), one_process(), tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=tuning.batch_size,
            learning_rate=tuning.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            seed=tuning.seed,
            learning_rate_mapping={"layer_weights": LAYER_WEIGHTS_RATE} if weighted else {},
            # a passage would be its own negative
            batch_sampler=BatchSamplers.NO_DUPLICATES if ranking else BatchSamplers.BATCH_SAMPLER,
            prompts={column: prompt for column, prompt in encoder.prompts.items() if prompt and ranking},
            use_cpu=encoder.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        arguments._n_gpu = 1  # it has no setting; on several GPUs the trainer would multiply the batch
        trainer = SentenceTransformerTrainer(
            model=encoder,
            args=arguments,
            train_dataset=Dataset.from_dict(dict(examples)),
            loss=loss_module(encoder, loss, tuning.mini_batch),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assert trainer.state.global_step == steps
    encoder.eval()


def loss_module(encoder: "SentenceTransformer", name: str, mini_batch: int) -> "Module":
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import SimilarityFunction

    options: dict[str, Any] = {}
    if name == "MultipleNegativesRankingLoss":
        options["similarity_fct"] = SimilarityFunction.to_similarity_fn(encoder.similarity_fn_name)
        options["scale"] = 20.0 if encoder.similarity_fn_name == "cosine" else 1.0
        if mini_batch:
            name, options["mini_batch_size"] = f"Cached{name}", mini_batch
    return getattr(losses, name)(encoder, **options)


@contextlib.contextmanager
def in_length_groups(encoder: "SentenceTransformer") -> Iterator[None]:
    """A batch is computed in groups of like length, each padded to its own longest text. The loss sees the same batch.

    On pairs of the STS benchmark, 64 at a time on one CPU core, a step takes half as long.
    """
    import torch

    whole = encoder.forward

    def grouped(features: dict[str, Any], **options: Any) -> dict[str, Any]:
        mask = features.get("attention_mask")
        if mask is None or mask.ndim != 2 or not mask[:, 0].all():  # padded on the left
            return whole(features, **options)
        lengths = mask.sum(dim=1)
        order = lengths.argsort()
        embeddings = []
        for rows in order.chunk(LENGTH_GROUPS):
            longest = int(lengths[rows[-1]])
            group = {
                name: value[rows, :longest] if isinstance(value, torch.Tensor) and value.shape == mask.shape else value
                for name, value in features.items()
            }
            embeddings.append(whole(group, **options)["sentence_embedding"])
        return {"sentence_embedding": torch.cat(embeddings)[order.argsort()]}

    encoder.forward = grouped  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del encoder.forward


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Without the variables of a group of processes, which Lightning leaves set: the trainer would share the examples
    out, and drop those that fill no batch."""
    names = {"LOCAL_RANK", "RANK", "WORLD_SIZE"} & os.environ.keys()
    group = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ |= group
