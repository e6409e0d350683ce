"""ELECTRA's generator: BERT's layers, over embeddings that may be narrower than these, and so is the MLM head.

Its discriminator has no MLM head: a masked LM needs one that is trained, which `google/electra-small-generator` is.
"""

from torch import Tensor, nn

from condenser.models.backbones.bert import Bert, linear, norm


class Electra(Bert):
    model_types = ("electra",)

    @property
    def widening(self) -> nn.Linear | None:
        return getattr(self.lm.electra, "embeddings_project", None)

    def transform(self, hidden: Tensor) -> Tensor:
        head = self.lm.generator_predictions
        return norm(head.activation(linear(hidden, head.dense)), head.LayerNorm).to(hidden.dtype)
