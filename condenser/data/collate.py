"""From sample indices to a masked, padded micro-batch of tensors.

Everything a step needs on the host (lengths, counts, the positions that the loss reads) is computed here, so that the
training step never waits for the device. Legend: B samples, L padded length, M masked tokens, Q queries of a sample.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from condenser.data.masking import IGNORED, Unit, mask_tokens
from condenser.data.store import TokenStore


@dataclass(frozen=True)
class Vocabulary:
    """The ids that collation needs."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    random_ids: np.ndarray  # every id but the special ones

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """Raises ValueError for a tokenizer without one of the tokens."""
        ids = {}
        for name in ("cls", "sep", "pad", "mask"):
            ids[f"{name}_id"] = getattr(tokenizer, f"{name}_token_id")
            if ids[f"{name}_id"] is None:
                raise ValueError(
                    f"the tokenizer {tokenizer.name_or_path!r} has no {name} token, which Condenser pre-training needs"
                )
        ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        return cls(**ids, random_ids=ordinary)


@dataclass(frozen=True)
class Masking:
    """How tokens are masked; see `mask_tokens`."""

    seed: int
    probability: float = 0.15
    rates: tuple[float, float, float] = (0.8, 0.1, 0.1)
    unit: Unit = "word"

    def __post_init__(self):
        if not 0 < self.probability < 1:
            raise ValueError(f"mask_probability={self.probability} must lie between 0 and 1")
        if len(self.rates) != 3 or min(self.rates) < 0 or abs(sum(self.rates) - 1) > 1e-6:
            raise ValueError(f"mask_rates={list(self.rates)} must be three shares (mask, random, keep) that sum to 1")


def make_micro_batch(
    store: TokenStore, index: np.ndarray, vocabulary: Vocabulary, masking: Masking, epoch: int
) -> dict[str, Any]:
    """Read samples ``index`` ``[B]``, mask them as in ``epoch``, add special tokens and pad to the longest."""
    input_ids, word_starts, lengths = store.rows(index)
    inputs, labels = mask_tokens(
        input_ids,
        word_starts,
        lengths,
        seed=masking.seed,
        epoch=epoch,
        sample_ids=index,
        mask_id=vocabulary.mask_id,
        random_ids=vocabulary.random_ids,
        probability=masking.probability,
        rates=masking.rates,
        unit=masking.unit,
    )
    return {"sample_ids": torch.from_numpy(index), "epoch": epoch, **pad(inputs, labels, lengths, vocabulary)}


def pad(inputs: np.ndarray, labels: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> dict[str, Any]:
    """Masked rows ``[B, L-2]`` without special tokens -> the fields of a padded micro-batch."""
    n_rows, width = len(inputs), inputs.shape[1] + 2
    positions = np.arange(width)
    ends = lengths[:, None] + 1  # where [SEP] stands
    input_ids = np.full((n_rows, width), vocabulary.pad_id, np.int64)
    input_ids[:, 1:-1] = np.where(positions[1:-1] < ends, inputs, vocabulary.pad_id)
    input_ids[:, 0] = vocabulary.cls_id
    np.put_along_axis(input_ids, ends, vocabulary.sep_id, axis=1)
    padded_labels = np.full((n_rows, width), IGNORED, np.int64)
    padded_labels[:, 1:-1] = labels
    masked_index, query_index, masked_slot = positions_read(padded_labels)
    arrays = {
        "input_ids": input_ids,
        "attention_mask": (positions <= ends).astype(np.int64),
        "labels": padded_labels,
        "masked_index": masked_index,
        "query_index": query_index,
        "masked_slot": masked_slot,
    }
    counts = {"n_masked": len(masked_index), "n_tokens": int(ends.sum()) + n_rows, "area": input_ids.size}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | counts


def positions_read(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the loss reads, from ``labels`` ``[B, L]``: [CLS] and the masked positions.

    Returns:
        masked_index ``[M]`` into ``[B * L]``; query_index ``[B, Q]``, [CLS] then the masked positions, padded with 0;
        masked_slot ``[M]``, where the masked positions are in ``[B * Q]``.
    """
    masked = labels != IGNORED
    rows, columns = masked.nonzero()
    rank = masked.cumsum(axis=1)[rows, columns]  # 1 for a row's first masked position: slot 0 is [CLS]
    n_queries = int(masked.sum(axis=1).max()) + 1
    query_index = np.zeros((len(labels), n_queries), np.int64)
    query_index[rows, rank] = columns
    return rows * labels.shape[1] + columns, query_index, rows * n_queries + rank
