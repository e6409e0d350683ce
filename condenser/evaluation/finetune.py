"""Contrastive fine-tuning on (query, relevant passage) pairs, the other passages of the batch as negatives.

The loss and the batches without duplicates are those of sentence-transformers; its trainer is not used, as it would ask
for one more package (accelerate) and a folder to write to. AdamW, 10 % warm-up, linear decay, gradient norm 1. There is
no dropout: its noise is larger than the differences between an untrained encoder's [CLS] vectors, which would collapse.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class FineTuning:
    """Settings of a fine-tuning; the result is a function of them, the encoder and the pairs."""

    steps: int
    batch_size: int  # pairs
    learning_rate: float  # peak
    seed: int  # of the batches

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.learning_rate <= 0:
            raise ValueError(f"fine-tuning takes steps >= 1, batch size >= 2 and learning rate > 0, not {self}")


def fine_tune(encoder: "SentenceTransformer", pairs: Sequence[tuple[str, str]], settings: FineTuning) -> list[float]:
    """Train ``encoder`` in place. -> the loss of each step"""
    import torch
    from rich.progress import track
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import SimilarityFunction, batch_to_device
    from transformers import get_linear_schedule_with_warmup

    scale = 20.0 if encoder.similarity_fn_name == "cosine" else 1.0
    similarity = SimilarityFunction.to_similarity_fn(encoder.similarity_fn_name)
    loss_of = MultipleNegativesRankingLoss(encoder, scale=scale, similarity_fct=similarity)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=settings.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    batches = itertools.islice(pair_batches(encoder, pairs, settings), settings.steps)
    losses = []
    encoder.eval()  # no dropout
    for batch in track(batches, description="Fine-tuning", total=settings.steps):
        loss = loss_of([batch_to_device(column, encoder.device) for column in batch], labels=None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def pair_batches(
    encoder: "SentenceTransformer", pairs: Sequence[tuple[str, str]], settings: FineTuning
) -> Iterator[list[dict]]:
    """Endlessly [tokenized queries, tokenized passages], shuffled anew each epoch; no text occurs twice in a batch."""
    import torch
    from datasets import Dataset
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    queries, passages = zip(*pairs, strict=True)
    dataset = Dataset.from_dict({"query": queries, "passage": passages})
    sampler = NoDuplicatesBatchSampler(
        dataset, settings.batch_size, drop_last=False, generator=torch.Generator(), seed=settings.seed
    )
    prompts = encoder.prompts
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for rows in sampler:
            yield [
                encoder.preprocess([queries[row] for row in rows], prompt=prompts.get("query")),
                encoder.preprocess([passages[row] for row in rows], prompt=prompts.get("document")),
            ]
