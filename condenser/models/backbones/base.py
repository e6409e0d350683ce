"""What a family of Hugging Face masked language models offers: its parts, and how they are run over flat arrays.

A family joins by a file in this folder with a subclass of `Backbone` (or by one anywhere that is imported), see
docs/backbones.md. Its own modules are used as they are, so that state dicts, initialisation and export stay Hugging
Face's.

Legend: T tokens, Q positions read in the last layers, M masked tokens, H hidden size, A attention heads, D their size,
V vocabulary.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, PretrainedConfig, PreTrainedModel

from condenser.models.attention import PLAIN, Bounds, Scores, Sequences, attend, self_attend, take
from condenser.models.files import is_run, reading
from condenser.online import ask_hub

Placed = tuple[Tensor, Tensor, Bounds]  # states [T, H], their positions [T], and where sequences lie
ALL, QUERY, KEY_VALUE = slice(0, 3), slice(0, 1), slice(1, 3)  # of a layer's projections
# how weights are loaded, so that `check_complete` can tell what they lack
REPORTED: dict[str, Any] = {"dtype": "float32", "output_loading_info": True, "ignore_mismatched_sizes": True}


class Backbone(ABC):
    """A masked LM, taken apart; the parts are its own modules, not copies."""

    model_types: ClassVar[tuple[str, ...]] = ()  # Hugging Face's names
    has_kernel = True  # whether a GPU attends to sequences as they lie
    shares_layers = False  # whether layers have weights in common
    other_names: ClassVar[dict[str, str]] = {}  # of settings, by BERT's; a recipe means the same whatever the family

    def __init__(self, lm: PreTrainedModel):
        self.lm: Any = lm

    @property
    def embeddings(self) -> Any:
        return self.lm.base_model.embeddings

    @property
    def below(self) -> list[nn.Module]:
        """What comes before the first layer."""
        return [self.embeddings]

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList: ...

    @property
    def decoder(self) -> nn.Linear:
        """``[M, H]`` -> logits ``[M, V]``, tied to the word embeddings."""
        return self.lm.get_output_embeddings()

    @abstractmethod
    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """States ``[T, H]`` of tokens ``[T]``; ``position_ids`` begin at 0 with a sequence, or behind its padding."""

    @abstractmethod
    def projected(self, layer: Any, hidden: Tensor, which: slice, position_ids: Tensor) -> Tensor:
        """Those of a layer's queries, keys and values that ``which`` says, side by side, of states ``[T, H]`` at these
        positions: ``[T, 1 to 3, A, D]``."""

    @abstractmethod
    def finished(self, layer: Any, own: Tensor, attended: Tensor) -> Tensor:
        """A layer's output ``[Q, H]`` for states ``own`` ``[Q, H]`` and what they saw, ``[Q, A, D]``."""

    @abstractmethod
    def dropped(self, layer: Any) -> float:
        """Share of what a position sees that a layer drops now."""

    def scores(self, layer: Any) -> Scores:
        return PLAIN

    def run(self, layer: Any, hidden: Tensor, sequences: Sequences, at_queries: bool) -> Tensor:
        """A layer's output ``[T, H]``, or at the queries alone ``[Q, H]``, equal to the whole output there."""
        position_ids, keys, index = sequences.position_ids, sequences.keys, sequences.query_index
        if at_queries:
            own = take(hidden, index), position_ids.index_select(0, index), sequences.queries
            return self.cross(layer, own, (hidden, position_ids, keys), index)
        states = self.projected(layer, hidden, ALL, position_ids)
        return self.finished(layer, hidden, self_attend(states, keys, self.dropped(layer), self.scores(layer)))

    def run_cross(self, layer: Any, query: Tensor, context: Tensor, rows: Bounds, position_ids: Tensor) -> Tensor:
        """A layer's output ``[T, H]`` where its queries are other states than its keys and values, ``[T, H]`` each, and
        the ``rows`` say by their mask which of these each query sees."""
        return self.cross(layer, (query, position_ids, rows), (context, position_ids, rows))

    def cross(self, layer: Any, own: Placed, context: Placed, query_index: Tensor | None = None) -> Tensor:
        """Where queries are of ``own`` states, keys and values of the ``context``."""
        (states, at, queries), (others, position_ids, keys) = own, context
        query = self.projected(layer, states, QUERY, at).squeeze(1)
        key_value = self.projected(layer, others, KEY_VALUE, position_ids)
        attended = attend(query, key_value, queries, keys, self.dropped(layer), self.scores(layer), query_index)
        return self.finished(layer, states, attended)

    @abstractmethod
    def position_states(self, position_ids: Tensor) -> Tensor:
        """What stands for positions ``[T]`` in the embeddings: ``[T, H]``."""

    def last(self, hidden: Tensor) -> Tensor:
        """``[Q, H]`` -> ``[Q, H]``: what comes after the last layer, and after those of a head."""
        return hidden

    @abstractmethod
    def transform(self, hidden: Tensor) -> Tensor:
        """``[M, H]`` -> ``[M, H]``: what the MLM head does before its decoder."""

    def fresh_layer(self) -> nn.Module:
        """One more layer, for a head; its weights are still to be drawn."""
        return type(self.layers[0])(self.lm.config)

    def mlm_head(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))

    @classmethod
    def first_position(cls, config: Any) -> int:
        """The number that a text's first position has in the embeddings."""
        return 0

    def positions(self, attention_mask: Tensor) -> Tensor:
        """Of the tokens of padded rows ``[B, L]``, as Hugging Face counts them."""
        return torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)


NAMED: list[type[Backbone]] = []  # by model.backbone_family: it is taken, whatever else there is of its model types


def families() -> dict[str, type[Backbone]]:
    """By Hugging Face's name of the model type."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return {name: family for family in (*with_subclasses(Backbone), *NAMED) for name in family.model_types}


def with_subclasses(each: Any) -> Iterator[Any]:
    """A class and all that are derived from it, each after its bases."""
    yield each
    for derived in each.__subclasses__():
        yield from with_subclasses(derived)


def longest_text(config: Any) -> int | None:
    """Tokens that a model of this configuration takes at most, special ones among them; None where it does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions and positions - families().get(config.model_type, Backbone).first_position(config)


def backbone_of(lm: PreTrainedModel) -> Backbone:
    """Raises ValueError for a model type that no family takes."""
    known, model_type = families(), lm.config.model_type
    if model_type not in known:
        choices = ", ".join(sorted(known))
        raise ValueError(
            f"a backbone of type {model_type!r} is not supported; choose one of: {choices}; "
            "docs/backbones.md says how a family is added; one of your own is known once it is imported, by "
            "model.backbone_family or CONDENSER_IMPORT=module"
        )
    if getattr(lm.config, "is_decoder", False):
        raise ValueError("the backbone is a decoder, which sees a text from one side: set is_decoder to false")
    if lm.config.num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers={lm.config.num_hidden_layers}: the backbone has no layer")
    if (kind := str(getattr(lm.config, "position_embedding_type", ""))).startswith("relative_key"):
        raise ValueError(
            f"position_embedding_type={kind!r}: transformers 5 leaves such positions out, and trains others"
        )
    return known[model_type](lm)


def depths(lm: PreTrainedModel) -> dict[nn.Parameter, int]:
    """How far each weight lies below the MLM head: 1 for the last layer's, N + 1 for the embeddings'. Layers that share
    weights are one."""
    backbone = backbone_of(lm)
    found = dict.fromkeys(lm.parameters(), 0)
    layers = [nn.ModuleList(backbone.layers)] if backbone.shares_layers else [*reversed(backbone.layers)]
    for below, layer in enumerate([*layers, nn.ModuleList(backbone.below)], start=1):
        found |= dict.fromkeys(layer.parameters(), below)
    return found


def prepare_layers(lm: PreTrainedModel, freeze_embeddings: bool, freeze_layers: int, reinit_layers: int) -> None:
    """Keep the embeddings and the first layers as they are, and draw the last layers anew.

    Raises:
        ValueError: more layers than there are, or one that would be both.
    """
    layers = backbone_of(lm).layers
    if min(freeze_layers, reinit_layers) < 0 or freeze_layers + reinit_layers > len(layers):
        raise ValueError(
            f"freeze_layers={freeze_layers} and reinit_layers={reinit_layers}: the backbone has {len(layers)} layers"
        )
    if backbone_of(lm).shares_layers and freeze_layers + reinit_layers:
        raise ValueError(
            f"freeze_layers={freeze_layers} and reinit_layers={reinit_layers}: the layers of {lm.config.model_type} "
            "share their weights"
        )
    for layer in layers[len(layers) - reinit_layers :]:
        for parameter in layer.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # else loaded weights are left alone
        layer.apply(lm._init_weights)
    for kept in [*(backbone_of(lm).below if freeze_embeddings else []), *layers[:freeze_layers]]:
        kept.requires_grad_(False)


def build_masked_lm(
    backbone: str | None,
    settings: dict[str, Any],
    hub: Mapping[str, Any] = {},
    **defaults: Any,
) -> PreTrainedModel:
    """A masked LM warm-started from ``backbone`` (folder or hub name), or a BERT with random weights where it is None.

    Args:
        settings: Hugging Face configuration settings that win over those of ``backbone`` (or of ``BertConfig``).
        hub: arguments of Hugging Face's ``from_pretrained`` (revision, token).
        defaults: settings for a model from scratch that ``settings`` leaves open (vocabulary size, padding id).

    Raises:
        ValueError: a setting that the configuration class does not know, another architecture than the weights, or
            weights that are damaged or would run code.
    """
    if backbone is None:
        return AutoModelForMaskedLM.from_config(with_settings(BertConfig(**defaults), settings))
    config = with_settings(config_of(backbone, hub), settings, backbone)
    with reading(backbone):
        lm, report = AutoModelForMaskedLM.from_pretrained(
            backbone, config=config, trust_remote_code=False, **REPORTED, **hub
        )
    check_complete(backbone, report)
    return lm


def check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Raises ValueError where files lack weights, by Hugging Face's report of loading them."""
    other = [f"{key} is {[*there]} there and {[*here]} here" for key, there, here in report["mismatched_keys"]]
    for lost, what in ((report["missing_keys"], "missing"), (other, "of another shape")):
        if lost:
            raise ValueError(
                f"the weights in {name!r} do not make a masked LM of this configuration: {len(lost)} are {what}, "
                f"{min(lost)} for one"
            )


def config_of(name: str, hub: Mapping[str, Any] = {}) -> PretrainedConfig:
    """The configuration of a folder or hub name.

    Raises:
        ValueError: none there, or one that needs code of its own.
    """
    if is_run(name):
        raise ValueError(
            f"{name} is a run or its checkpoint: export it first, `condenser export {name} --output FOLDER`"
        )
    if not Path(name).is_dir():
        ask_hub()
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        line = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else str(error).splitlines()[0]
        raise ValueError(f"no configuration could be loaded from {name!r}: {line}") from None


def with_settings(config: PretrainedConfig, settings: dict[str, Any], name: str | None = None) -> PretrainedConfig:
    """The configuration of ``name`` with ``settings`` in it. Raises ValueError for one that it does not know, and where
    they make no model."""
    kind = type(config).__name__
    family = families().get(config.model_type, Backbone)
    names = {**config.attribute_map, **family.other_names}
    settings = {names.get(key, key): value for key, value in settings.items()}
    if unknown := sorted(settings.keys() - (config.to_dict().keys() - {"model_type", "dtype"})):
        raise ValueError(f"backbone_config: {kind} has no setting {', '.join(map(repr, unknown))}")
    try:
        for key, value in settings.items():
            setattr(config, key, value)
        with torch.device("meta"):
            AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of any module that is made of them
        reason = " ".join(str(error).split())
        raise ValueError(
            f"backbone_config makes no model of {name or kind}: {type(error).__name__}: {reason}"
        ) from None
    return config
