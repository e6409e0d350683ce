"""Fine-tuning an encoder before it is evaluated, by sentence-transformers' trainer: AdamW, 10 % warm-up, linear decay,
gradient norm 1, weights in fp32, computed in fp32 or on GPUs in bf16. On a CPU it repeats bit for bit.
"""

import contextlib
import hashlib
import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from condenser.evaluation.encoders import Encoder, backbone, precision, prompt_of
from condenser.runs import at_least

LENGTH_GROUPS = 4  # with 8, the products of small matrices cost as much as the padding that is saved
POOLING_RATE = 1e-2  # of a pooling's few weights, which hardly move at an encoder's rate
POOLING_WEIGHTS = "layer_weights|attention_query"
HELD_OUT = 0.1  # of the training split, to choose settings by
NEGATIVES_FROM = 200  # first hits of BM25, as for MS MARCO: the very first are often relevant, and not judged
SCALE = 20.0  # of cosines in the ranking losses: sentence-transformers' own
RANKING = "MultipleNegativesRankingLoss"
PAIR_LOSSES = {"cosent": "CoSENTLoss", "cosine": "CosineSimilarityLoss"}


@dataclass(frozen=True)
class Tuning:
    epochs: float = 3.0  # passes over the examples, see `n_steps`
    batch_size: int = 64  # examples; a question's other negatives are the passages of the batch
    learning_rate: float | None = 2e-5  # its peak; None to choose it, and a similarity, see `Candidate.chosen`
    hard_negatives: int = 0  # beside each relevant passage, drawn from BM25's first that are not judged
    mini_batch: int = 0  # examples computed at a time, by gradient caching; 0 is all
    train_size: int | None = None  # questions or pairs, drawn from the training split; None is all
    pair_loss: str | None = "cosent"  # of scored pairs: cosent or cosine; None for retrieval
    seed: int = 0  # of the draws and the order

    def __post_init__(self) -> None:
        at_least("finetune-batch-size", self.batch_size, 2)
        at_least("hard-negatives", self.hard_negatives, 0)
        if self.hard_negatives > NEGATIVES_FROM:
            raise ValueError(f"--hard-negatives {self.hard_negatives}: BM25 gives {NEGATIVES_FROM} to draw from")
        at_least("mini-batch", self.mini_batch, 0)
        at_least("train-sizes", self.train_size, 2)
        if not 0 <= self.seed < 2**32:  # numpy's
            raise ValueError(f"--seeds {self.seed}: give whole numbers from 0 to {2**32 - 1}")
        for option, rate in {"epochs": self.epochs, "learning-rate": self.learning_rate}.items():
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"--finetune-{option} {rate} must be positive")
        if self.pair_loss not in (*PAIR_LOSSES, None):
            raise ValueError(f"--pair-losses {self.pair_loss}: there are {' and '.join(PAIR_LOSSES)}")

    def n_steps(self, n_examples: int, share: float = 1.0) -> int:
        """Of passes whose batches hold a ``share`` of the examples, as those with a text of the batch are left out. The
        last batch of one is smaller, so 2.5 passes over 1,000 by 64 are 40 steps."""
        batches = round(math.ceil(n_examples / self.batch_size) / share)
        return max(1, math.ceil(round(self.epochs * batches, 6)))


def is_held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < HELD_OUT * 2**64


def fine_tune(encoder: Encoder, examples: Mapping[str, list], tuning: Tuning) -> dict[str, Any]:
    """Train in place, on columns of questions, passages and negatives, by the ranking loss, or of two sentences and
    their score. -> what the row of a table says of it"""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
    from transformers import PrinterCallback

    # no dropout: its noise is larger than the first differences between an untrained encoder's [CLS] vectors
    backbone(encoder).config.attention_probs_dropout_prob = 0.0
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder.model_card_data.widget = [{}]  # else the trainer draws examples for a model card
    name = PAIR_LOSSES[tuning.pair_loss or "cosent"] if "score" in examples else RANKING
    n_examples = len(next(iter(examples.values())))
    dataset, share = Dataset.from_dict(dict(examples)), 1.0
    if name == RANKING:
        batches = NoDuplicatesBatchSampler(
            dataset, tuning.batch_size, False, generator=torch.Generator(), seed=tuning.seed
        )
        share = sum(map(len, itertools.islice(batches, len(batches)))) / n_examples
    steps = tuning.n_steps(n_examples, share)
    loss, scale = loss_module(encoder, name, tuning.mini_batch)
    # the trainer wants a folder; nothing is kept of it
    with in_length_groups(encoder), one_process(), tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=encoder,
            args=arguments(encoder, examples, tuning, steps, folder),
            train_dataset=dataset,
            loss=loss,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assert trainer.state.global_step == steps
    encoder.eval()
    how = {"loss": name, "scale": scale, "learning_rate": tuning.learning_rate, "steps": steps, "examples": n_examples}
    return how | {setting: getattr(tuning, setting) for setting in ("epochs", "batch_size", "hard_negatives")}


def arguments(encoder: Encoder, examples: Mapping[str, list], tuning: Tuning, steps: int, folder: str) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments

    assert tuning.learning_rate is not None
    ranking = "score" not in examples
    kinds: Any = dict.fromkeys(examples, "document" if ranking else "sentence") | {"query": "query"}
    texts = [column for column in examples if column != "score"]
    weighted = any(re.search(POOLING_WEIGHTS, name) and each.requires_grad for name, each in encoder.named_parameters())
    found = SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=tuning.batch_size,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        seed=tuning.seed,
        learning_rate_mapping={POOLING_WEIGHTS: POOLING_RATE} if weighted else {},
        # a passage would be its own negative
        batch_sampler="no_duplicates" if ranking else "batch_sampler",
        prompts={column: prompt for column in texts if (prompt := prompt_of(encoder, kinds[column]))},
        bf16=precision(encoder) == "bf16-mixed",
        use_cpu=encoder.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )
    found._n_gpu = 1  # on several GPUs the trainer would multiply the batch
    return found


def loss_module(encoder: Encoder, name: str, mini_batch: int) -> tuple[nn.Module, float | None]:
    """-> the loss, and by how much it multiplies similarities before the softmax (None where there is none)"""
    from sentence_transformers.sentence_transformer import losses

    if name == "CosineSimilarityLoss":
        return losses.CosineSimilarityLoss(encoder), None
    if name == "CoSENTLoss":
        return losses.CoSENTLoss(encoder, scale=SCALE), SCALE
    scale = SCALE if encoder.similarity_fn_name == "cosine" else 1.0
    if mini_batch:
        return losses.CachedMultipleNegativesRankingLoss(encoder, scale, encoder.similarity, mini_batch), scale
    return losses.MultipleNegativesRankingLoss(encoder, scale, encoder.similarity), scale


@contextlib.contextmanager
def in_length_groups(encoder: Encoder) -> Iterator[None]:
    """A batch is computed in groups of like length, each padded to its own longest text. The loss sees the same batch.

    On pairs of the STS benchmark, 64 at a time on one CPU core, a step takes half as long.
    """
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
