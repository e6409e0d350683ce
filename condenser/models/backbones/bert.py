"""BERT's kind: post-norm layers with absolute positions. BERT, RoBERTa, XLM-RoBERTa and CamemBERT are here; DistilBERT
and ELECTRA, which have other names for some parts, in files of their own.

States between layers are of autocast's type; LayerNorm and the residual before it are computed in fp32 under it.

Legend: T tokens, H hidden size.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condenser.models.attention import state_type
from condenser.models.backbones.base import Backbone
from condenser.models.dropout import drop


class Parts(NamedTuple):
    """The modules of a layer: attention, and what is done to each position after it."""

    query: Any
    key: Any
    value: Any
    out: Any
    out_norm: Any
    wide: Any
    act: Any
    narrow: Any
    narrow_norm: Any
    head_size: int
    dropout: Any  # of what attention sees
    out_dropout: Any = None
    narrow_dropout: Any = None


class Bert(Backbone):
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    projections: ClassVar[tuple[str, ...]] = ("query", "key", "value")  # their names in Hugging Face's attention
    widens_first = False  # whether embeddings are made wide before they are normed

    @property
    def widening(self) -> nn.Linear | None:
        """What makes embeddings, where they are narrower, as wide as the states between layers."""
        return None

    @property
    def below(self) -> list[nn.Module]:
        return [self.embeddings, *([] if self.widening is None else [self.widening])]

    @property
    def layers(self) -> nn.ModuleList:
        return self.lm.base_model.encoder.layer

    def parts(self, layer: Any) -> Parts:
        attention, out = layer.attention.self, layer.attention.output
        query, key, value = (getattr(attention, name) for name in self.projections)
        return Parts(
            query=query,
            key=key,
            value=value,
            out=out.dense,
            out_norm=out.LayerNorm,
            head_size=attention.attention_head_size,
            dropout=attention.dropout,
            out_dropout=out.dropout,
            **feed_forward(layer),
        )

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        parts = self.embeddings
        hidden = embedded(input_ids, parts.word_embeddings)
        if parts.position_embeddings is not None:
            hidden = hidden + self.of_positions(position_ids)
        if (types := getattr(parts, "token_type_embeddings", None)) is not None:
            hidden = hidden + (types.weight[0] if token_type_ids is None else embedded(token_type_ids, types))
        elif token_type_ids is not None and not hasattr(parts, "token_type_embeddings"):
            raise ValueError(f"token_type_ids are nothing that a {self.lm.config.model_type} takes")
        if self.widening is not None and self.widens_first:
            hidden = linear(hidden, self.widening)
        hidden = drop(norm(hidden, parts.LayerNorm).to(state_type(hidden)), parts.dropout)
        return hidden if self.widening is None or self.widens_first else linear(hidden, self.widening)

    def of_positions(self, position_ids: Tensor) -> Tensor:
        return embedded(position_ids, self.embeddings.position_embeddings)

    def position_states(self, position_ids: Tensor) -> Tensor:
        if self.embeddings.position_embeddings is None:  # positions are in the scores alone
            return self.embeddings.word_embeddings.weight.new_zeros(len(position_ids), self.lm.config.hidden_size)
        states = self.of_positions(position_ids)
        return states if self.widening is None else F.linear(states, self.widening.weight)

    def projected(self, layer: Any, hidden: Tensor, which: slice, position_ids: Tensor) -> Tensor:
        parts = self.parts(layer)
        layers = parts[:3][which]
        return linear(hidden, *layers).unflatten(-1, (len(layers), -1, parts.head_size))

    def finished(self, layer: Any, own: Tensor, attended: Tensor) -> Tensor:
        parts = self.parts(layer)
        hidden = added(own, drop(linear(attended.flatten(1), parts.out), parts.out_dropout), parts.out_norm)
        wide = parts.act(linear(hidden, parts.wide))
        return added(hidden, drop(linear(wide, parts.narrow), parts.narrow_dropout), parts.narrow_norm)

    def dropped(self, layer: Any) -> float:
        dropout = self.parts(layer).dropout
        return dropout.p if dropout.training else 0.0

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.cls.predictions.transform
        return norm(head.transform_act_fn(linear(hidden, head.dense)), head.LayerNorm).to(hidden.dtype)


def feed_forward(layer: Any) -> dict[str, Any]:
    """`Parts` of what comes after attention, by the names that BERT's modules have."""
    wide, narrow = layer.intermediate, layer.output
    return {
        "wide": wide.dense,
        "act": wide.intermediate_act_fn,
        "narrow": narrow.dense,
        "narrow_norm": narrow.LayerNorm,
        "narrow_dropout": narrow.dropout,
    }


class Roberta(Bert):
    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")

    def of_positions(self, position_ids: Tensor) -> Tensor:
        return super().of_positions(position_ids + self.first_position(self.lm.config))

    @classmethod
    def first_position(cls, config: Any) -> int:
        return config.pad_token_id + 1

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.lm_head
        return norm(F.gelu(linear(hidden, head.dense)), head.layer_norm).to(hidden.dtype)

    def positions(self, attention_mask: Tensor) -> Tensor:
        return (attention_mask.cumsum(1) - 1).clamp(min=0)  # padding before a text is passed over


def embedded(ids: Tensor, layer: Any) -> Tensor:
    """By a function, as a decoder embeds a second time (torch's memory tracker wants a module to be called once)."""
    return F.embedding(ids, layer.weight, layer.padding_idx)


def linear(hidden: Tensor, *layers: Any) -> Tensor:
    """The outputs of all ``layers`` side by side, by one product."""
    if len(layers) == 1:
        return F.linear(hidden, layers[0].weight, layers[0].bias)
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return F.linear(hidden, weight, bias)


def norm(hidden: Tensor, layer: Any) -> Tensor:
    return F.layer_norm(hidden.to(layer.weight.dtype), layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def added(hidden: Tensor, more: Tensor, layer: Any) -> Tensor:
    return norm(hidden + more, layer).to(hidden.dtype)
