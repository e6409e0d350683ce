"""MPNet: BERT's layers, whose attention adds to each score what belongs to the distance of the two positions."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from condenser.models.attention import Scores
from condenser.models.backbones.bert import Bert, Parts, feed_forward, linear, norm


class MPNet(Bert):
    model_types = ("mpnet",)
    has_kernel = False

    @property
    def decoder(self) -> nn.Linear:
        return self.lm.lm_head.decoder

    def parts(self, layer: Any) -> Parts:
        attention, out = layer.attention.attn, layer.attention
        return Parts(
            query=attention.q,
            key=attention.k,
            value=attention.v,
            out=attention.o,
            out_norm=out.LayerNorm,
            head_size=attention.attention_head_size,
            dropout=attention.dropout,
            out_dropout=out.dropout,
            **feed_forward(layer),
        )

    def scores(self, layer: Any) -> Scores:
        return Scores(bias=self.by_distance)

    def by_distance(self, distances: Tensor, query: Tensor, key: Tensor) -> Tensor:
        encoder = self.lm.mpnet.encoder
        found = F.embedding(encoder.relative_position_bucket(distances), encoder.relative_attention_bias.weight)
        return found.movedim(-1, 1)

    def of_positions(self, position_ids: Tensor) -> Tensor:
        return super().of_positions(position_ids + self.first_position(self.lm.config))

    @classmethod
    def first_position(cls, config: Any) -> int:
        return 2  # whatever the padding id

    def positions(self, attention_mask: Tensor) -> Tensor:
        return (attention_mask.cumsum(1) - 1).clamp(min=0)

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.lm_head
        return norm(F.gelu(linear(hidden, head.dense)), head.layer_norm).to(hidden.dtype)
