"""From sample indices to a masked micro-batch of tensors, padded ``[B, L]`` or packed ``[T]``.

Everything a step needs on the host (lengths, counts, the positions that the loss reads) is computed here, so that the
training step never waits for the device.

Legend: B samples, L padded length, T tokens, M masked tokens, Q queries ([CLS] and the masked tokens): of a sample,
padded, in the padded layout; of all samples in the packed one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from condenser.data.masking import IGNORED, Unit, mask_tokens
from condenser.data.store import SPECIAL_TOKENS

Layout = Literal["padded", "packed"]


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
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray],
    sample_ids: np.ndarray,
    visits: int | np.ndarray,
    vocabulary: Vocabulary,
    masking: Masking,
    layout: Layout = "padded",
    multiple_of: int = 1,
) -> dict[str, Any]:
    """Mask samples, add special tokens, and lay them out.

    Args:
        tokens: input_ids and word_starts ``[B, L-2]``, lengths ``[B]``, as `TokenStore.rows` gives them.
        sample_ids: ``[B]``.
        visits: how often each sample was seen before (the epoch, for a single store); its masks depend on it.
        layout: "padded" ``[B, L]`` or "packed" ``[T]``.
        multiple_of: L is rounded up to a multiple of this.
    """
    input_ids, word_starts, lengths = tokens
    inputs, labels = mask_tokens(
        input_ids,
        word_starts,
        lengths,
        seed=masking.seed,
        epoch=visits,
        sample_ids=sample_ids,
        mask_id=vocabulary.mask_id,
        random_ids=vocabulary.random_ids,
        probability=masking.probability,
        rates=masking.rates,
        unit=masking.unit,
    )
    inputs, labels, real = with_special_tokens(inputs, labels, lengths, vocabulary, multiple_of)
    arrays = pad(inputs, labels, real) if layout == "padded" else pack(inputs, labels, real)
    per_row, masked_per_row = real.sum(axis=1), (labels != IGNORED).sum(axis=1)
    counts = {"n_masked": len(arrays["masked_index"]), "n_tokens": int(per_row.sum()), "area": arrays["input_ids"].size}
    counts["pairs"] = int((per_row**2).sum())  # of tokens that attend to each other
    counts["query_pairs"] = int((per_row * (1 + masked_per_row)).sum())  # of [CLS] and masked tokens with all
    if layout == "packed":
        counts |= {"max_seqlen": int(per_row.max()), "max_query": int(masked_per_row.max()) + 1}
    arrays = {"sample_ids": sample_ids, **arrays}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | counts


def with_special_tokens(
    inputs: np.ndarray, labels: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, multiple_of: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows ``[B, L-2]`` -> [CLS] row [SEP] and padding: ids, labels, and which are real ``[B, L]``."""
    n_rows, width = inputs.shape
    ends = lengths[:, None] + 1  # where [SEP] stands
    positions = np.arange(-(-(width + SPECIAL_TOKENS) // multiple_of) * multiple_of)
    input_ids = np.full((n_rows, len(positions)), vocabulary.pad_id, np.int64)
    input_ids[:, 1 : width + 1] = np.where(positions[1 : width + 1] < ends, inputs, vocabulary.pad_id)
    input_ids[:, 0] = vocabulary.cls_id
    np.put_along_axis(input_ids, ends, vocabulary.sep_id, axis=1)
    framed_labels = np.full(input_ids.shape, IGNORED, np.int64)
    framed_labels[:, 1 : width + 1] = labels
    return input_ids, framed_labels, positions <= ends


def pad(input_ids: np.ndarray, labels: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of a padded micro-batch. ``query_index`` ``[B, Q]`` is [CLS] and a row's masked positions, padded with
    0; ``masked_slot`` ``[M]`` where the masked positions are in ``[B * Q]``."""
    masked = labels != IGNORED
    rows, columns = masked.nonzero()
    rank = masked.cumsum(axis=1)[rows, columns]  # 1 for a row's first masked position: slot 0 is [CLS]
    n_queries = int(masked.sum(axis=1).max()) + 1
    query_index = np.zeros((len(labels), n_queries), np.int64)
    query_index[rows, rank] = columns
    return {
        "input_ids": input_ids,
        "attention_mask": real.astype(np.int64),
        "labels": labels,
        "masked_index": rows * labels.shape[1] + columns,
        "query_index": query_index,
        "masked_slot": rows * n_queries + rank,
    }


def pack(input_ids: np.ndarray, labels: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of a packed micro-batch: the real tokens, row after row. ``query_index`` ``[Q]`` is every [CLS]
    (``cu_seqlens[:-1]``) and masked position in order; ``masked_slot`` ``[M]`` where the masked ones are in it."""
    read = labels != IGNORED
    read[:, 0] = True
    flat_labels, flat_read = labels[real], read[real]
    query_index = flat_read.nonzero()[0]
    return {
        "input_ids": input_ids[real],
        "position_ids": real.nonzero()[1],
        "labels": flat_labels,
        "cu_seqlens": bounds(real),
        "masked_index": (flat_labels != IGNORED).nonzero()[0],
        "query_index": query_index,
        "cu_seqlens_query": bounds(read),
        "masked_slot": (flat_labels[query_index] != IGNORED).nonzero()[0],
    }


def bounds(of_row: np.ndarray) -> np.ndarray:
    """``[B, L]`` booleans -> where each row's true ones begin when they are put one after the other ``[B + 1]``."""
    return np.append(0, of_row.sum(axis=1).cumsum()).astype(np.int32)
