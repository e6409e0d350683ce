"""ModernBERT: norms before attention and before what follows it, rotated positions, gated layers, most of which see a
window alone.

States between layers are a sum that nothing norms, and stay in fp32; a last norm comes after the last layer. A head's
layers see everything, whatever the layers of the backbone do.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condenser.models.attention import Scores
from condenser.models.backbones.base import Backbone
from condenser.models.backbones.bert import embedded, linear, norm
from condenser.models.dropout import drop


class ModernBert(Backbone):
    model_types = ("modernbert",)
    other_names: ClassVar[dict[str, str]] = {
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_act": "hidden_activation",
    }

    @property
    def layers(self) -> nn.ModuleList:
        return self.lm.model.layers

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        if token_type_ids is not None:
            raise ValueError("token_type_ids are nothing that a modernbert takes")
        hidden = norm(embedded(input_ids, self.embeddings.tok_embeddings), self.embeddings.norm)
        return drop(hidden, self.embeddings.drop)

    def position_states(self, position_ids: Tensor) -> Tensor:
        """None: positions turn queries and keys."""
        return self.embeddings.tok_embeddings.weight.new_zeros(len(position_ids), self.lm.config.hidden_size)

    def projected(self, layer: Any, hidden: Tensor, which: slice, position_ids: Tensor) -> Tensor:
        of, kinds = layer.attn, range(3)[which]
        rows = slice(*(kind * self.lm.config.hidden_size for kind in (kinds.start, kinds.stop)))
        weights: Any = [None if each is None else each[rows] for each in (of.Wqkv.weight, of.Wqkv.bias)]
        hidden = hidden if isinstance(layer.attn_norm, nn.Identity) else norm(hidden, layer.attn_norm)
        states = F.linear(hidden, *weights).unflatten(-1, (len(kinds), -1, of.head_dim))
        parts = zip(kinds, states.unbind(1), strict=True)
        return torch.stack([self.rotated(layer, each, position_ids) if kind < 2 else each for kind, each in parts], 1)

    def dropped(self, layer: Any) -> float:
        return layer.attn.attention_dropout if layer.training else 0.0

    def scores(self, layer: Any) -> Scores:
        window = layer.attn.sliding_window
        return Scores(window=None if window is None else window - 1)

    def rotated(self, layer: Any, states: Tensor, position_ids: Tensor) -> Tensor:
        """``[T, A, D]``, turned by positions ``[T]``, in fp32."""
        cos, sin = self.lm.model.rotary_emb(states.float(), position_ids[None], layer.attention_type)
        one, other = states.float().chunk(2, dim=-1)
        turned = states.float() * cos[0, :, None] + torch.cat([-other, one], dim=-1) * sin[0, :, None]
        return turned.to(states.dtype)

    def finished(self, layer: Any, own: Tensor, attended: Tensor) -> Tensor:
        of_heads, mlp = layer.attn, layer.mlp
        out = linear(attended.flatten(1), of_heads.Wo)
        hidden = own + (drop(out, of_heads.out_drop) if isinstance(of_heads.out_drop, nn.Dropout) else out)
        wide, gate = linear(norm(hidden, layer.mlp_norm), mlp.Wi).chunk(2, dim=-1)
        return hidden + linear(drop(mlp.act(wide) * gate, mlp.drop), mlp.Wo)

    def last(self, hidden: Tensor) -> Tensor:
        return norm(hidden, self.lm.model.final_norm)

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.head
        return norm(head.act(linear(hidden, head.dense)), head.norm)

    def fresh_layer(self) -> nn.Module:
        layer: Any = type(self.layers[0])(self.lm.config, min(1, len(self.layers) - 1))  # the first has no norm before
        # turned as full layers are, where there is one
        layer.attention_type, layer.attn.sliding_window = min(self.lm.config.layer_types), None
        return layer
