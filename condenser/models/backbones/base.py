"""Hugging Face masked language models, taken apart: embeddings, transformer layers, MLM head.

A family joins by an entry in ``FAMILIES``, provided that its layers have BERT's sub-modules (``attention.self.query``,
``attention.output``, ``feed_forward_chunk``...), which ``attention.py`` calls when it prunes a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, PretrainedConfig, PreTrainedModel

from condenser.models.files import reading


class Parts(NamedTuple):
    """The pieces of a masked LM that a Condenser runs one by one."""

    embeddings: nn.Module
    layers: nn.ModuleList
    transform: Callable  # [M, H] -> [M, H]: what the MLM head does before its decoder
    decoder: nn.Linear  # [M, H] -> logits [M, V], tied to the word embeddings

    def mlm_head(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


def bert_parts(lm: Any) -> Parts:
    head = lm.cls.predictions
    return Parts(lm.bert.embeddings, lm.bert.encoder.layer, head.transform, head.decoder)


def roberta_parts(lm: Any) -> Parts:
    head = lm.lm_head
    return Parts(
        lm.roberta.embeddings,
        lm.roberta.encoder.layer,
        lambda hidden: head.layer_norm(F.gelu(head.dense(hidden))),
        head.decoder,
    )


FAMILIES = {"bert": bert_parts, "roberta": roberta_parts, "xlm-roberta": roberta_parts, "camembert": roberta_parts}


def parts(lm: PreTrainedModel) -> Parts:
    """Take ``lm`` apart; the pieces are its own modules, not copies.

    Raises:
        ValueError: the model type is not in ``FAMILIES``.
    """
    model_type = lm.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"a backbone of type {model_type!r} is not supported; choose one of: {', '.join(FAMILIES)}")
    return FAMILIES[model_type](lm)


def embed(embeddings: Any, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    """States ``[B, L, H]`` of padded ``input_ids`` ``[B, L]``; ``[1, T, H]`` of packed ones ``[T]``, whose
    ``position_ids`` ``[T]`` begin at 0 with every sequence."""
    if position_ids is None:
        return embeddings(input_ids)
    padding = embeddings.position_embeddings.padding_idx  # RoBERTa's positions begin after it
    return embeddings(input_ids[None], position_ids=position_ids[None] + (0 if padding is None else padding + 1))


def depths(lm: PreTrainedModel) -> dict[nn.Parameter, int]:
    """How far each weight lies below the MLM head: 1 for the last layer's, N + 1 for the embeddings'."""
    embeddings, layers, _, _ = parts(lm)
    found = dict.fromkeys(lm.parameters(), 0)
    for below, layer in enumerate([*reversed(layers), embeddings], start=1):
        found |= dict.fromkeys(layer.parameters(), below)
    return found


def prepare_layers(lm: PreTrainedModel, freeze_embeddings: bool, freeze_layers: int, reinit_layers: int) -> None:
    """Keep the embeddings and the first layers as they are, and draw the last layers anew.

    Raises:
        ValueError: more layers than there are, or one that would be both.
    """
    embeddings, layers, _, _ = parts(lm)
    if min(freeze_layers, reinit_layers) < 0 or freeze_layers + reinit_layers > len(layers):
        raise ValueError(
            f"freeze_layers={freeze_layers} and reinit_layers={reinit_layers}: the backbone has {len(layers)} layers"
        )
    for layer in layers[len(layers) - reinit_layers :]:
        for parameter in layer.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # else loaded weights are left alone
        layer.apply(lm._init_weights)
    for kept in [*([embeddings] if freeze_embeddings else []), *layers[:freeze_layers]]:
        kept.requires_grad_(False)


def build_masked_lm(backbone: str | None, settings: dict[str, Any], **defaults: Any) -> PreTrainedModel:
    """A masked LM warm-started from ``backbone`` (folder or hub name), or a BERT with random weights where it is None.

    Args:
        settings: Hugging Face configuration settings that win over those of ``backbone`` (or of ``BertConfig``).
        defaults: settings for a model from scratch that ``settings`` leaves open (vocabulary size, padding id).

    Raises:
        ValueError: a setting that the configuration class does not know, another architecture than the weights, or
            weights that are damaged or would run code.
    """
    if backbone is None:
        check_settings(settings, BertConfig())
        return AutoModelForMaskedLM.from_config(BertConfig(**{**defaults, **settings}))
    config = changed_config(backbone, settings)
    with reading(backbone):
        lm, report = AutoModelForMaskedLM.from_pretrained(
            backbone, config=config, dtype="float32", output_loading_info=True, trust_remote_code=False
        )
    if report["missing_keys"]:
        raise ValueError(
            f"the weights in {backbone!r} do not make a masked LM of this configuration: "
            f"{len(report['missing_keys'])} are missing, {sorted(report['missing_keys'])[0]} for one"
        )
    return lm


def changed_config(backbone: str, settings: dict[str, Any]) -> PretrainedConfig:
    """The configuration of ``backbone`` with ``settings`` in it.

    Raises:
        ValueError: a setting that it does not know, or a configuration that needs code of its own.
    """
    try:
        config = AutoConfig.from_pretrained(backbone, trust_remote_code=False)
    except ValueError as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"no configuration could be loaded from {backbone!r}: {line}") from None
    check_settings(settings, config)
    for key, value in settings.items():
        setattr(config, key, value)
    return config


def check_settings(settings: dict[str, Any], config: PretrainedConfig) -> None:
    unknown = sorted(set(settings) - set(config.to_dict()))
    if unknown:
        raise ValueError(f"backbone_config: {type(config).__name__} has no setting {', '.join(map(repr, unknown))}")
