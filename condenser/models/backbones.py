"""Hugging Face masked language models, taken apart: embeddings, transformer layers, MLM head.

A family joins by a line in ``FAMILIES``, provided that its layers have BERT's sub-modules (``attention.self.query``,
``attention.output``, ``feed_forward_chunk``...), which ``attention.py`` calls when it prunes a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, PretrainedConfig, PreTrainedModel

FAMILIES = {  # model_type: (encoder attribute, MLM head attribute)
    "bert": ("bert", "cls"),
    "roberta": ("roberta", "lm_head"),
    "xlm-roberta": ("roberta", "lm_head"),
    "camembert": ("roberta", "lm_head"),
}


class Parts(NamedTuple):
    """The pieces of a masked LM that a Condenser runs one by one."""

    embeddings: Callable  # input_ids [B, L] -> [B, L, H]
    layers: nn.ModuleList
    mlm_head: Callable  # [M, H] -> logits [M, V]: transform + tied decoder


def parts(lm: PreTrainedModel) -> Parts:
    """Take ``lm`` apart; the pieces are its own modules, not copies.

    Raises:
        ValueError: the model type is not in ``FAMILIES``.
    """
    model_type = lm.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"a backbone of type {model_type!r} is not supported; choose one of: {', '.join(FAMILIES)}")
    encoder, mlm_head = (getattr(lm, name) for name in FAMILIES[model_type])
    return Parts(encoder.embeddings, encoder.encoder.layer, mlm_head)


def depths(lm: PreTrainedModel) -> dict[nn.Parameter, int]:
    """How far each weight lies below the MLM head: 1 for the last layer's, N + 1 for the embeddings'."""
    embeddings, layers, _ = parts(lm)
    found = dict.fromkeys(lm.parameters(), 0)
    for below, layer in enumerate([*reversed(layers), embeddings], start=1):
        found |= dict.fromkeys(layer.parameters(), below)  # type: ignore[attr-defined]
    return found


def prepare_layers(lm: PreTrainedModel, freeze_embeddings: bool, freeze_layers: int, reinit_layers: int) -> None:
    """Keep the embeddings and the first layers as they are, and draw the last layers anew.

    Raises:
        ValueError: more layers than there are, or one that would be both.
    """
    embeddings, layers, _ = parts(lm)
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
        ValueError: a setting that the configuration class does not know, or another architecture than the weights.
    """
    if backbone is None:
        check_settings(settings, BertConfig())
        return AutoModelForMaskedLM.from_config(BertConfig(**{**defaults, **settings}))
    config = AutoConfig.from_pretrained(backbone)
    check_settings(settings, config)
    for key, value in settings.items():
        setattr(config, key, value)
    lm, report = AutoModelForMaskedLM.from_pretrained(
        backbone, config=config, dtype="float32", output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(
            f"the weights in {backbone!r} do not make a masked LM of this configuration: "
            f"{len(report['missing_keys'])} are missing, {sorted(report['missing_keys'])[0]} for one"
        )
    return lm


def check_settings(settings: dict[str, Any], config: PretrainedConfig) -> None:
    unknown = sorted(set(settings) - set(config.to_dict()))
    if unknown:
        raise ValueError(f"backbone_config: {type(config).__name__} has no setting {', '.join(map(repr, unknown))}")
