"""ELECTRA's generator: BERT's layers, over embeddings that may be narrower than these, and so is the MLM head.

Its discriminator has no MLM head: a masked LM needs one that is trained, which `google/electra-small-generator` is.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from condenser.models.backbones.bert import Bert, linear, norm


class Electra(Bert):
    model_types = ("electra",)

    @property
    def decoder(self) -> nn.Linear:
        return self.lm.generator_lm_head

    @property
    def below(self) -> list[nn.Module]:
        return [*super().below, *([self.widening] if self.widening else [])]

    @property
    def widening(self) -> nn.Linear | None:
        return getattr(self.lm.electra, "embeddings_project", None)

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = super().embed(input_ids, position_ids, token_type_ids)
        return hidden if self.widening is None else linear(hidden, self.widening)

    def position_states(self, position_ids: Tensor) -> Tensor:
        states = self.of_positions(position_ids)
        return states if self.widening is None else F.linear(states, self.widening.weight)

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.generator_predictions
        return norm(head.activation(linear(hidden, head.dense)), head.LayerNorm).to(hidden.dtype)
