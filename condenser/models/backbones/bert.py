"""BERT's kind: post-norm layers with absolute positions (BERT, RoBERTa, XLM-RoBERTa, CamemBERT).

States between layers are of autocast's type; LayerNorm and the residual before it are computed in fp32 under it.

Legend: T tokens, Q queries, H hidden size, A attention heads, D their size.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condenser.models.attention import Bounds, Sequences, attend, attend_within, take
from condenser.models.backbones.base import Backbone
from condenser.models.dropout import drop


class Bert(Backbone):
    model_types: ClassVar[tuple[str, ...]] = ("bert",)

    @property
    def embeddings(self) -> Any:
        return self.lm.base_model.embeddings

    @property
    def layers(self) -> nn.ModuleList:
        return self.lm.base_model.encoder.layer

    @property
    def decoder(self) -> nn.Linear:
        return self.lm.cls.predictions.decoder

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        parts = self.embeddings
        types = parts.token_type_embeddings
        hidden = embedded(input_ids, parts.word_embeddings) + self.position_states(position_ids)
        hidden = hidden + (types.weight[0] if token_type_ids is None else embedded(token_type_ids, types))
        hidden = norm(hidden, parts.LayerNorm).to(state_type(hidden))
        return drop(hidden, parts.dropout)

    def position_states(self, position_ids: Tensor) -> Tensor:
        return embedded(position_ids, self.embeddings.position_embeddings)

    def run(self, layer: Any, hidden: Tensor, where: Sequences, at_queries: bool) -> Tensor:
        if at_queries:
            return self.between(layer, take(hidden, where.query_index), hidden, where.queries, where.keys)
        attention = layer.attention.self
        states = linear(hidden, attention.query, attention.key, attention.value)
        states = states.unflatten(-1, (3, -1, attention.attention_head_size))  # [T, 3, A, D]
        return self.mixed(layer, hidden, attend_within(states, where.keys, dropped_share(layer)))

    def run_between(self, layer: Any, query: Tensor, context: Tensor, rows: Bounds) -> Tensor:
        return self.between(layer, query, context, rows, rows)

    def between(self, layer: Any, own: Tensor, context: Tensor, queries: Bounds, keys: Bounds) -> Tensor:
        attention = layer.attention.self
        query = linear(own, attention.query).unflatten(-1, (-1, attention.attention_head_size))  # [Q, A, D]
        key_value = linear(context, attention.key, attention.value)
        key_value = key_value.unflatten(-1, (2, -1, attention.attention_head_size))  # [T, 2, A, D]
        return self.mixed(layer, own, attend(query, key_value, queries, keys, dropped_share(layer)))

    def mixed(self, layer: Any, own: Tensor, attended: Tensor) -> Tensor:
        """The output ``[Q, H]`` of a layer for states ``own`` ``[Q, H]`` and what they saw, ``[Q, A, D]``."""
        of_heads = layer.attention.output
        hidden = added(own, drop(linear(attended.flatten(1), of_heads.dense), of_heads.dropout), of_heads.LayerNorm)
        wide = layer.intermediate.intermediate_act_fn(linear(hidden, layer.intermediate.dense))
        return added(hidden, drop(linear(wide, layer.output.dense), layer.output.dropout), layer.output.LayerNorm)

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.cls.predictions.transform
        return norm(head.transform_act_fn(linear(hidden, head.dense)), head.LayerNorm).to(hidden.dtype)


class Roberta(Bert):
    model_types = ("roberta", "xlm-roberta", "camembert")

    @property
    def decoder(self) -> nn.Linear:
        return self.lm.lm_head.decoder

    def position_states(self, position_ids: Tensor) -> Tensor:
        return super().position_states(position_ids + self.first_position(self.lm.config))

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


def dropped_share(layer: Any) -> float:
    """Of what a layer's attention sees."""
    return layer.attention.self.dropout.p if layer.training else 0.0


def added(hidden: Tensor, more: Tensor, layer: Any) -> Tensor:
    return norm(hidden + more, layer).to(hidden.dtype)


def state_type(hidden: Tensor) -> torch.dtype:
    """Of what lies between layers."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
