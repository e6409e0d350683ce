"""DistilBERT: BERT's layers under other names, without token types, and without dropout after attention."""

from typing import Any, ClassVar

from torch import Tensor, nn

from condenser.models.backbones.bert import Bert, Parts, linear, norm


class DistilBert(Bert):
    model_types = ("distilbert",)
    other_names: ClassVar[dict[str, str]] = {
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_dropout_prob": "dropout",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    }

    @property
    def layers(self) -> nn.ModuleList:
        return self.lm.distilbert.transformer.layer

    def parts(self, layer: Any) -> Parts:
        of, after = layer.attention, layer.ffn
        return Parts(
            query=of.q_lin,
            key=of.k_lin,
            value=of.v_lin,
            out=of.out_lin,
            out_norm=layer.sa_layer_norm,
            wide=after.lin1,
            act=after.activation,
            narrow=after.lin2,
            narrow_norm=layer.output_layer_norm,
            head_size=of.attention_head_size,
            dropout=of.dropout,
            narrow_dropout=after.dropout,
        )

    def transform(self, hidden: Tensor) -> Tensor:
        lm = self.lm
        return norm(lm.activation(linear(hidden, lm.vocab_transform)), lm.vocab_layer_norm).to(hidden.dtype)
