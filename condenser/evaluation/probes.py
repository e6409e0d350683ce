"""Two claims of the paper, measured: the head reads from [CLS], and [CLS] attends to the whole text in every layer.

    head losses        the head's MLM loss with the sample's own last [CLS], with another sample's, and with zeros: what
                       it loses without the true one is what pre-training has put into [CLS]
    attention entropy  how widely [CLS] attends, by layer, before and after fine-tuning: the more alike, the less has to
                       be rearranged (the paper's "structural readiness"; measured as by Clark et al., 2019)

`probe_store` takes both of a model and a token store. While training runs, the callback `Probes` does.

Legend: B samples, L padded length, A attention heads, N layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from condenser.data.collate import Masking, StepBatch, Vocabulary, collate
from condenser.data.mixing import Mixture
from condenser.data.store import TokenStore
from condenser.data.tokenizers import load_tokenizer
from condenser.models.backbones.base import families
from condenser.models.objective import Objective, identity

BATCH_SIZE = 32  # at most
ROWS = 4  # whose attention weights are kept at a time, [B, A, L, L] of all layers
READ_BY_HEAD = {  # in place of the last [CLS] states [B, H]
    "true": identity,
    "other": lambda cls: cls.roll(1, dims=0),
    "zeros": torch.zeros_like,
}


def probe_store(
    model: Objective | None, encoder: PreTrainedModel, store_folder: str | Path, n_sequences: int = 64, seed: int = 0
) -> dict[str, Any]:
    """`probe` on ``n_sequences`` of a store's validation split, masked by ``seed``; ValueError if there is none. The
    encoder's vocabulary must be that of the store."""
    validation = Mixture([TokenStore(store_folder, "validation")], seed=seed)
    vocabulary = Vocabulary.of(load_tokenizer(Path(store_folder) / "tokenizer"))
    extras = model.asks if model is not None else ()
    return probe(model, encoder, sample_batches(validation, vocabulary, Masking(seed), n_sequences, extras))


def probe(model: Objective | None, encoder: PreTrainedModel, batches: Sequence[StepBatch]) -> dict[str, Any]:
    """Plain numbers on batches of a pass each: ``sequences``; ``cls_entropy_nats`` and ``cls_entropy`` (normalised), a
    list by layer each; and of a ``model`` that has a head ``head_loss``, with ``true``, ``other`` and ``zeros``."""
    rows = torch.tensor([float(batch.total("n_sequences")) for batch in batches])
    means = [torch.stack(cls_attention_entropy(encoder, *unmasked(batch))).cpu() for batch in batches]
    nats, normalised = (torch.stack(means, dim=-1) @ rows / rows.sum()).tolist()
    found = {"sequences": int(rows.sum()), "cls_entropy_nats": nats, "cls_entropy": normalised}
    return found | ({"head_loss": head_losses(model, batches)} if model is not None and model.head_term else {})


def sample_batches(
    validation: Mixture, vocabulary: Vocabulary, masking: Masking, n_sequences: int, extras: Sequence[str] = ()
) -> list[StepBatch]:
    """``n_sequences`` in batches of a pass each, always the same: spread evenly over the split, so that neighbours are
    of different documents, and masked as in epoch 0."""
    n = len(validation)
    n_sequences = min(n_sequences, n)
    if n_sequences < 2:
        where = ", ".join(str(store.folder) for store in validation.stores)
        raise ValueError(
            f"probes compare n_sequences >= 2 of a validation split, and {where} has {n} there: "
            "prepare it with a larger --validation-fraction"
        )
    numbers = np.arange(n_sequences) * n // n_sequences * validation.each  # of pairs the first
    batches = []
    for some in np.array_split(numbers, -(-n_sequences // BATCH_SIZE)):
        rows, visits, ids = validation.sequences(0, some)
        batches.append(StepBatch.of([collate(rows, ids, visits, vocabulary, masking, extras)]))
    return batches


def unmasked(batch: StepBatch) -> tuple[Tensor, Tensor]:
    """The text of a pass before it was masked, in padded rows ``[B, L]``: ids, and which are real."""
    (fields,) = batch
    texts = fields["input_ids"].index_copy(0, fields["masked_index"], fields["labels"])
    rows = texts.split(fields["cu_seqlens"].diff().tolist())
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


def head_losses(model: Any, batches: Sequence[StepBatch]) -> dict[str, float]:
    """The loss of a head (or decoder) in nats per token that it predicts, by what it reads in place of the last [CLS]:
    the sample's own (true), that of the row before in its batch of two or more (other), or zeros."""
    device, before = next(model.parameters()).device, model.cls_hook
    sums, n_scored = dict.fromkeys(READ_BY_HEAD, 0.0), 0
    try:
        with at_rest(model):
            for batch in batches:
                for fields in batch.to(device):
                    for name, model.cls_hook in READ_BY_HEAD.items():
                        term = model.losses(fields, score=True)[model.head_term]
                        assert term.losses is not None
                        sums[name] += term.losses.double().sum().item()
                    n_scored += fields[term.over]
    finally:
        model.cls_hook = before
    return {name: value / n_scored for name, value in sums.items()}


def cls_attention_entropy(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of what [CLS] attends to, by layer ``[N]``: in nats, and divided by log n for a text of n tokens (special
    ones included, padding not), so that 1 is attention to all alike. Means over heads and samples."""
    of_layers = cls_attention(encoder, input_ids, attention_mask)
    nats = torch.stack([torch.special.entr(each).sum(-1).mean(1) for each in of_layers])  # [N, B]
    lengths = attention_mask.sum(dim=1).to(nats.device)
    return nats.mean(dim=1), (nats / lengths.log()).mean(dim=1)


def cls_attention(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """How much of [CLS]'s attention each position of unmasked text ``[B, L]`` has, of each layer ``[B, A, L]``. The
    encoder may have its MLM head; ValueError for one that is not of our families."""
    if encoder.config.model_type not in (known := families()):
        raise ValueError(
            f"attention of a {encoder.config.model_type!r} cannot be probed; of these it can: {', '.join(known)}"
        )
    copy: Any = deepcopy(encoder)  # as the library leaves hooks in a model that is to give out its attention
    copy.set_attn_implementation("eager")  # the only one that has weights to look at
    found = []
    with at_rest(copy):
        for ids, mask in zip(input_ids.split(ROWS), attention_mask.split(ROWS), strict=True):
            ids, mask = ids.to(copy.device), mask.to(copy.device)
            of_layers = copy.base_model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
            found.append([each[:, :, 0].float() for each in of_layers])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient, no autocast; then every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
