"""ALBERT: one layer of BERT's kind (or a few), which is run again and again, over narrow embeddings.

As layers share their weights, none can be frozen, drawn anew, or trained at a rate of its own.
"""

from typing import Any

from torch import Tensor, nn

from condenser.models.backbones.bert import Bert, Parts, linear, norm


class Albert(Bert):
    model_types = ("albert",)
    shares_layers = True

    @property
    def layers(self) -> nn.ModuleList:
        config, groups = self.lm.config, self.lm.albert.encoder.albert_layer_groups
        n, of_groups = config.num_hidden_layers, [group.albert_layers for group in groups]
        return nn.ModuleList(layer for depth in range(n) for layer in of_groups[depth * len(groups) // n])

    @property
    def widening(self) -> nn.Linear:
        return self.lm.albert.encoder.embedding_hidden_mapping_in

    def parts(self, layer: Any) -> Parts:
        of = layer.attention
        return Parts(
            query=of.query,
            key=of.key,
            value=of.value,
            out=of.dense,
            out_norm=of.LayerNorm,
            wide=layer.ffn,
            act=layer.activation,
            narrow=layer.ffn_output,
            narrow_norm=layer.full_layer_layer_norm,
            head_size=of.attention_head_size,
            dropout=of.attention_dropout,
            out_dropout=of.output_dropout,
        )

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.predictions
        return norm(head.activation(linear(hidden, head.dense)), head.LayerNorm).to(hidden.dtype)
