"""From samples to what a step computes: masked sequences in flat arrays, one after the other, in one buffer a step.

A *micro-batch* is the unit of order and accounting, a *pass* what is computed at once: one micro-batch, or several put
together, which changes no mask and no loss. Everything that a step needs on the host (lengths, counts, the positions
that the loss reads) is computed here, so that it never waits for the device.

Legend: B sequences, T tokens, Q positions read in the last layers ([CLS] and the masked tokens), M masked tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any, Self, get_args

import numpy as np
import torch
from torch import Tensor

from condenser.data.hashing import hash_ints
from condenser.data.masking import IGNORED, Unit, mask_flat
from condenser.data.store import SPECIAL_TOKENS, Rows
from condenser.data.tokenizers import special_ids

Fields = dict[str, Any]  # of a pass: arrays (or tensors) and host ints


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
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "mask")}
        if missing := [name for name in ids if ids[name] is None]:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no {missing[0]} token, which pre-training needs"
            )
        ordinary = np.setdiff1d([*tokenizer.get_vocab().values()], special_ids(tokenizer))
        return cls(ids["cls"], ids["sep"], ids["pad"], ids["mask"], random_ids=ordinary)


@dataclass(frozen=True)
class Masking:
    """How tokens are masked: by `mask_flat`, or otherwise where a subclass overrides `mask`, which a YAML names
    (`data.masking`). Further settings of a subclass (`data.masking_options`) are the fields of a frozen dataclass."""

    seed: int
    probability: float = 0.15
    rates: tuple[float, float, float] = (0.8, 0.1, 0.1)
    unit: Unit = "word"

    def __post_init__(self):
        if self.unit not in get_args(Unit):
            raise ValueError(f"mask_unit={self.unit} must be one of {', '.join(get_args(Unit))}")
        if not 0 < self.probability < 1:
            raise ValueError(f"mask_probability={self.probability} must lie between 0 and 1")
        if not (len(self.rates) == 3 and min(self.rates) >= 0 and abs(sum(self.rates) - 1) <= 1e-6):
            raise ValueError(f"mask_rates={list(self.rates)} must be three shares (mask, random, keep) that sum to 1")

    @classmethod
    def of(cls, usual: dict[str, Any], options: dict[str, Any]) -> Self:
        """Raises ValueError for an option that the class does not have, or that has a setting of its own."""
        own = [field.name for field in fields_of(cls) if field.name not in usual]
        if unknown := [name for name in options if name not in own]:
            raise ValueError(
                f"data.masking_options: {cls.__name__} has no {', '.join(unknown)}; it has {', '.join(own) or 'none'}"
            )
        try:
            return cls(**usual, **options)
        except TypeError as error:
            raise ValueError(
                f"data.masking: {error}; further settings of a masking are the fields of a frozen dataclass"
            ) from None

    def mask(
        self, rows: Rows, visits: int | np.ndarray, sample_ids: np.ndarray, vocabulary: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray]:
        """The changed tokens ``[T]``, and which of them are to be predicted, ascending ``[M]``. What becomes of a
        sample is a function of ``seed``, its tokens, its ``visits`` and its id, whatever else is in the pass."""
        return mask_flat(
            *rows,
            seed=self.seed,
            epoch=visits,
            sample_ids=sample_ids,
            mask_id=vocabulary.mask_id,
            random_ids=vocabulary.random_ids,
            probability=self.probability,
            rates=self.rates,
            unit=self.unit,
        )

    def masked(self, rows: Rows, *of_samples: Any) -> tuple[np.ndarray, np.ndarray]:
        """As `mask`. Raises ValueError for what a subclass may not give."""
        found = self.mask(rows, *of_samples)
        if type(self).mask is not Masking.mask:
            check_masked(found, rows.tokens, f"data.masking: {type(self).__name__}.mask")
        return found

    def check(self, rows: Rows, vocabulary: Vocabulary) -> None:
        """Raises ValueError if what becomes of these samples is not theirs alone."""
        ids, begins = np.arange(len(rows.lengths)), np.append(0, rows.lengths.cumsum())
        name, given = type(self).__name__, rows.tokens.copy()
        try:
            inputs, chosen = self.masked(rows, ids % 2, ids, vocabulary)
        except TypeError as error:
            raise ValueError(f"data.masking: {name}.mask failed on {len(ids)} samples: {error}") from error
        if (rows.tokens != given).any():
            raise ValueError(f"data.masking: {name}.mask writes into the rows that it is given; let it copy the tokens")
        for one, (first, end) in zip(ids[:, None], itertools.pairwise(begins), strict=True):
            row = Rows(rows.tokens[first:end], rows.word_starts[first:end], rows.lengths[one])
            again = self.masked(row, one % 2, one, vocabulary)
            beside = inputs[first:end], chosen[(chosen >= first) & (chosen < end)] - first
            if not all(map(np.array_equal, again, beside)):
                raise ValueError(
                    f"data.masking: {name} masks a sample otherwise when it is asked again, or beside "
                    "other samples; let all that is drawn be of `hash_ints(self.seed, visits, sample_ids, ...)`"
                )


def check_masked(found: Any, tokens: np.ndarray, name: str) -> None:
    """Raises ValueError if what was found is not tokens, and places of these, where alone they may be others."""
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(each, np.ndarray) for each in found)):
        raise ValueError(f"{name} must return two arrays, the tokens [T] and which are to be predicted [M]")
    inputs, chosen = found
    if inputs.shape != tokens.shape or inputs.dtype.kind not in "iu" or chosen.ndim != 1 or chosen.dtype.kind != "i":
        raise ValueError(
            f"{name} must return integers, tokens [{len(tokens)}] and places [M]; it returned {inputs.dtype} "
            f"{list(inputs.shape)} and {chosen.dtype} {list(chosen.shape)}"
        )
    if (np.diff(chosen, prepend=-1) < 1).any() or (len(chosen) and chosen[-1] >= len(tokens)):
        raise ValueError(f"{name} must return places ascending, each once, from 0 to {len(tokens) - 1}")
    if n := np.count_nonzero(np.delete(inputs != tokens, chosen)):
        raise ValueError(f"{name} changed {n:,} tokens that are not among those to predict")


EXTRAS = ("original_ids", "keys", "real")  # what objectives may ask for beside what all get
KEYS = 8  # tells this draw from those of masking.py


def collate(
    rows: Rows,
    sample_ids: np.ndarray,
    visits: int | np.ndarray,
    vocabulary: Vocabulary,
    masking: Masking,
    extras: Sequence[str] = (),
) -> Fields:
    """Mask samples and add special tokens: a pass.

    Args:
        sample_ids: ``[B]``.
        visits: how often each sample was seen before (the epoch, for a single store); its masks depend on it.
        extras: of `EXTRAS`: ``original_ids [T]``, the tokens before they were masked, -100 where they are special or
            a dummy's; ``keys [B]``, a number below 2**31 for each sample, drawn anew at each visit; ``real [B]``, 0 for
            dummies and 1 for all others.

    Returns:
        Arrays: ``input_ids, position_ids [T]``; ``cu_seqlens [B + 1]``, where each sequence begins; of masked tokens
        ``masked_index [M]`` and ``labels [M]``; ``query_index [Q]``, every [CLS] and masked position in order,
        ``cu_seqlens_query [B + 1]``, and where the masked ones are in it, ``masked_slot [M]``; ``sample_ids [B]``.
        Host ints: ``max_seqlen, max_query``; ``n_sequences, n_tokens, n_masked``, and ``n_ordinary`` tokens that are
        not special; how many pairs of a query and a key attention has in a whole layer (``pairs``) and in a last one
        (``query_pairs``).
    """
    tokens, _, lengths = rows
    inputs, masked = masking.masked(rows, visits, sample_ids, vocabulary)
    sample_of_token = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(tokens)) + SPECIAL_TOKENS * sample_of_token + 1  # of each token, once [CLS], [SEP] are there
    framed = lengths + SPECIAL_TOKENS
    begins = np.append(0, framed.cumsum())
    input_ids = np.empty(begins[-1], np.int64)
    input_ids[begins[:-1]], input_ids[begins[1:] - 1], input_ids[place] = vocabulary.cls_id, vocabulary.sep_id, inputs
    sample_of_masked = sample_of_token[masked]
    n_read = 1 + np.bincount(sample_of_masked, minlength=len(lengths))  # of each sequence: [CLS] and the masked tokens
    begins_query = np.append(0, n_read.cumsum())
    masked_slot = np.arange(len(masked)) + sample_of_masked + 1
    query_index = np.empty(begins_query[-1], np.int64)
    query_index[begins_query[:-1]], query_index[masked_slot] = begins[:-1], place[masked]
    more: Fields = {}
    if "original_ids" in extras:
        more["original_ids"] = np.full(len(input_ids), IGNORED)
        more["original_ids"][place] = tokens
    if "keys" in extras:
        more["keys"] = (hash_ints(masking.seed, visits, sample_ids, KEYS) >> np.uint64(33)).astype(np.int64)
    if "real" in extras:
        more["real"] = np.ones(len(lengths), np.int64)
    return more | {
        "input_ids": input_ids,
        "position_ids": np.arange(len(input_ids)) - np.repeat(begins[:-1], framed),
        "cu_seqlens": begins,
        "masked_index": place[masked],
        "labels": tokens[masked].astype(np.int64),
        "query_index": query_index,
        "cu_seqlens_query": begins_query,
        "masked_slot": masked_slot,
        "sample_ids": sample_ids,
        "max_seqlen": int(framed.max()),
        "max_query": int(n_read.max()),
        "n_sequences": len(lengths),
        "n_tokens": len(input_ids),
        "n_masked": len(masked),
        "n_ordinary": len(tokens),
        "pairs": int((framed**2).sum()),
        "query_pairs": int((framed * n_read).sum()),
    }


class StepBatch:
    """The passes of one optimizer step of one rank. Their arrays lie in one buffer, which crosses processes (as one
    file descriptor) and goes to a device (as one copy) in one piece."""

    def __init__(self, buffer: Tensor, layout: list[Fields], n_sequences: int = 0):
        self.buffer, self.layout = buffer, layout  # layout: of each pass (first, end) in the buffer, and host ints
        self.n_sequences = n_sequences  # of the whole step, on all devices, where passes have ``slots``

    @classmethod
    def of(cls, passes: list[Fields], n_sequences: int = 0) -> "StepBatch":
        """Of no passes too, as a device has of a validation split of fewer rows than devices."""
        layout, arrays, end = [], [np.empty(0, np.int64)], 0
        for fields in passes:
            placed = {}
            for name, value in fields.items():
                if isinstance(value, np.ndarray):
                    arrays.append(value)
                    value = (end, end := end + len(value))
                placed[name] = value
            layout.append(placed)
        return cls(torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False)), layout, n_sequences)

    def __len__(self) -> int:
        return len(self.layout)

    def __iter__(self) -> Iterator[Fields]:
        """Each pass: views of the buffer, and host ints."""
        for placed in self.layout:
            yield {n: self.buffer[v[0] : v[1]] if isinstance(v, tuple) else v for n, v in placed.items()}

    def total(self, name: str) -> int:
        """Of a host int, the sum over passes."""
        return sum(placed[name] for placed in self.layout)

    @property
    def n_positions(self) -> int:
        """Tokens that are computed, those of dummies too."""
        return sum(end - first for first, end in (placed["input_ids"] for placed in self.layout))

    def to(self, device: Any, non_blocking: bool = True) -> "StepBatch":
        return StepBatch(self.buffer.to(device, non_blocking=non_blocking), self.layout, self.n_sequences)

    def pin_memory(self) -> "StepBatch":
        return StepBatch(self.buffer.pin_memory(), self.layout, self.n_sequences)
