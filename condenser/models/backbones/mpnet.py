"""MPNet: RoBERTa's layers, whose attention adds to each score what belongs to the distance of the two positions."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from condenser.models.attention import Scores
from condenser.models.backbones.bert import Parts, Roberta, feed_forward


class MPNet(Roberta):
    model_types = ("mpnet",)
    has_kernel = False

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

    @classmethod
    def first_position(cls, config: Any) -> int:
        return 2  # whatever the padding id
