"""Diagnostics while training runs, given in the configuration:

    trainer:
      callbacks:
        - class_path: condenser.evaluation.callbacks.Probes
          init_args: {every_n_steps: 1000, n_sequences: 64}
        - class_path: condenser.evaluation.callbacks.ZeroShotRetrieval
          init_args: {folder: data/raw/demo/beir, every_n_steps: 1000, n_documents: 1000}

They are for looking at, beside the losses. Checkpoints are not chosen by them, and cannot be, as what they log goes to
the loggers alone: before fine-tuning, [CLS] vectors are not trained to be compared, and their retrieval usually falls
while what fine-tuning makes of them improves.
"""

import copy
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from condenser.data.collate import Vocabulary
from condenser.evaluation.jobs import versions
from condenser.evaluation.probes import probe, sample_batches
from condenser.evaluation.retrieval import Collection, read_collection
from condenser.evaluation.search import dense_search, score
from condenser.models.backbones.base import longest_text
from condenser.models.objective import Objective

SHARE = 0.05  # of the time; what takes more is warned about
ENCODED_TOGETHER = 64  # texts
RETRIEVED = ("ndcg@10", "mrr@10", "recall@100", "map")


class Diagnostic(Callback):
    """Measures a copy of the model after the first step and after every ``every_n_steps``; training does not notice.

    The first rank measures, while the others wait for it. What is measured is the same whenever and wherever it is; the
    cost is bounded by what there is to measure, and logged as the share of the time since the last measurement; the
    throughput that is logged at that step includes it. Memory: the weights once more, while it lasts.
    """

    share = ""  # name of that metric

    def __init__(self, every_n_steps: int):
        if every_n_steps < 1:
            raise ValueError(f"{type(self).__name__}: every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps, self.warned = every_n_steps, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != 1 and step % self.every_n_steps:
            return
        began = time.perf_counter()
        model = whole_copy(pl_module.model)
        if trainer.is_global_zero:
            found = {f"probe/{name}": value for name, value in self.measure(model, trainer).items()}
            if step > 1:  # else there is no time to take a share of
                now = time.perf_counter()
                share = found[self.share] = (now - began) / (now - self.since)
                if share > SHARE and not self.warned:
                    self.warned = True
                    rank_zero_warn(
                        f"{type(self).__name__} takes {share:.0%} of the time: raise its every_n_steps="
                        f"{self.every_n_steps}, or let it measure on less"
                    )
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **found}, step=step - 1)  # as Lightning counts
        self.since = time.perf_counter()

    def measure(self, model: Objective, trainer: Any) -> dict[str, float]:
        raise NotImplementedError


class Probes(Diagnostic):
    """Logs ``probe/head_loss_true``, ``_other`` and ``_zeros``, and ``probe/cls_entropy_layer_1`` ... (normalised); see
    `condenser.evaluation.probes`. Costs about as much as four forward passes over the sequences.

    Args:
        every_n_steps: optimizer steps between two measurements.
        n_sequences: of the validation split, always the same.
    """

    share = "perf/probe_fraction"

    def __init__(self, every_n_steps: int = 1000, n_sequences: int = 64):
        super().__init__(every_n_steps)
        self.n_sequences = n_sequences

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule
        vocabulary = Vocabulary.of(data.tokenizer)
        self.batches = sample_batches(data.validation, vocabulary, data.masking, self.n_sequences, data.extras)

    def measure(self, model: Objective, trainer: Any) -> dict[str, float]:
        found = probe(model, model.lm, self.batches)
        losses = {f"head_loss_{name}": value for name, value in found.get("head_loss", {}).items()}
        return losses | {f"cls_entropy_layer_{n}": value for n, value in enumerate(found["cls_entropy"], start=1)}


class ZeroShotRetrieval(Diagnostic):
    """Logs nDCG@10, MRR@10, Recall@100 and MAP of raw [CLS] vectors as ``probe/ndcg@10`` ..., on a part of a BEIR
    folder: the first queries of its test set, the documents that are relevant to them, and the first others.

    The part is easier than the whole; numbers are comparable from step to step, not with those of `condenser evaluate`.

    Args:
        folder: corpus.jsonl, queries.jsonl and qrels/test.tsv, each plain or compressed.
        every_n_steps: optimizer steps between two measurements.
        n_documents: to search in.
        n_queries: to search for.
        max_length: tokens of queries and documents; by default the store's.
    """

    share = "perf/retrieval_fraction"

    def __init__(
        self,
        folder: str,
        every_n_steps: int = 1000,
        n_documents: int = 1000,
        n_queries: int = 100,
        max_length: int | None = None,
    ):
        versions()  # missing packages are to be missed before training
        super().__init__(every_n_steps)
        self.folder, self.n_documents, self.n_queries, self.max_length = folder, n_documents, n_queries, max_length

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.collection = part_of(read_collection(Path(self.folder)), self.n_documents, self.n_queries)
        longest = longest_text(pl_module.model.lm.config)  # type: ignore[union-attr]
        if self.max_length and longest and self.max_length > longest:
            raise ValueError(f"{type(self).__name__}: max_length={self.max_length}, the model takes {longest} tokens")

    def measure(self, model: Objective, trainer: Any) -> dict[str, float]:
        data, collection = trainer.datamodule, self.collection
        encoder: Any = ClsEncoder(model, data.tokenizer, self.max_length or data.about()["settings"]["max_length"])
        found = score(dense_search(encoder, collection.documents, collection.queries), collection.qrels)
        return {metric: found[metric] for metric in RETRIEVED}


class ClsEncoder:
    """Last [CLS] states, compared by their dot product: a `SentenceTransformer` as far as `dense_search` asks."""

    def __init__(self, model: Objective, tokenizer: Any, max_length: int):
        self.transformers_model: Any = model.lm.base_model
        self.device = model.lm.device
        self.tokenizer, self.max_seq_length = tokenizer, max_length

    @torch.no_grad()
    def encode_document(self, texts: list[str], **options: Any) -> Tensor:
        """Vectors ``[len(texts), H]``."""
        cut = {"truncation": True, "max_length": self.max_seq_length}
        # one by one: the library's own threads would not survive that loader workers are forked
        ids = [self.tokenizer(text, **cut)["input_ids"] for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = torch.empty(len(ids), self.transformers_model.config.hidden_size, device=self.device)
        for first in range(0, len(ids), ENCODED_TOGETHER):
            rows = order[first : first + ENCODED_TOGETHER]
            some = {"input_ids": [ids[i] for i in rows]}
            padded = self.tokenizer.pad(some, padding_side="right", return_tensors="pt").to(self.device)
            vectors[rows] = self.transformers_model(**padded).last_hidden_state[:, 0]
        return vectors

    encode_query = encode_document

    def similarity(self, queries: Tensor, documents: Tensor) -> Tensor:
        return queries @ documents.T


def part_of(collection: Collection, n_documents: int, n_queries: int) -> Collection:
    """The first queries, what is relevant to them, and the first other documents; ValueError if they are too many."""
    part = collection.part([*collection.qrels][:n_queries])
    relevant = {i for query in part.qrels for i in part.relevant(query, part.qrels)}
    if len(relevant) > n_documents:
        raise ValueError(
            f"{collection.name}: {len(relevant)} documents are relevant to the first n_queries={n_queries}; "
            f"raise n_documents={n_documents}, or take fewer queries"
        )
    others = [i for i in collection.documents if i not in relevant]
    chosen = relevant.union(others[: n_documents - len(relevant)])
    return replace(part, documents={i: text for i, text in collection.documents.items() if i in chosen})


@torch.no_grad()
def whole_copy(model: Objective) -> Objective:
    """The model as it is now, in fp32: not packed, not compiled, nothing shared with the one in training. No random
    numbers are drawn. Sharded weights are put together, for which all ranks have to ask."""
    theirs: dict[str, Any] = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    device = next(model.parameters()).device
    with torch.device("meta"):
        config = copy.deepcopy(model.lm.config)
        lm = type(model.lm)._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        own = type(model).from_masked_lm(lm, **model.settings)
    own.to_empty(device=device).lm.tie_weights()
    for name, mine in itertools.chain(own.named_parameters(), own.named_buffers()):
        value = theirs[name]
        mine.copy_(value.full_tensor() if hasattr(value, "full_tensor") else value)
    return own.eval()
