"""coCondenser (Gao & Callan, ACL 2022): Condenser, and [CLS] vectors that tell documents apart.

    loss = MLM(head) + MLM(late) + contrast        the contrast, over all spans of the step: which is my sibling?

Two spans of each document are in a step. Of the vectors of all spans, on all devices, each one's own document's other
span must score highest (equation 6 of the paper). Start from a Condenser with its head.

Legend: N spans of the step, H hidden size.
"""

from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from condenser.models.condenser import Condenser
from condenser.models.losses import pair_losses, pair_measures, pair_scores
from condenser.models.objective import Term


class CoCondenser(Condenser):
    """A Condenser with a contrast of spans.

    Args:
        lm, skip_from, n_head_layers, late_mlm, pruned: see `Condenser`; no head and no ``late_mlm`` is contrast alone.
        temperature: what scores are divided by.
        similarity: dot product, as the authors, or cosine.
        contrast_weight: of the contrast, beside ``mlm_weight`` of the other losses.

    Raises:
        ValueError: a temperature that is not positive, or a negative weight.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        skip_from: int = 6,
        n_head_layers: int = 2,
        late_mlm: bool = True,
        pruned: bool = True,
        temperature: float = 1.0,
        similarity: Literal["dot", "cosine"] = "dot",
        contrast_weight: float = 1.0,
        mlm_weight: float = 1.0,
    ):
        super().__init__(lm, skip_from, n_head_layers, late_mlm, pruned)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if similarity not in ("dot", "cosine"):
            raise ValueError(f"similarity={similarity!r} must be 'dot' or 'cosine'")
        if not min(contrast_weight, mlm_weight) >= 0:
            raise ValueError(f"contrast_weight={contrast_weight} and mlm_weight={mlm_weight} must not be negative")
        self.temperature, self.similarity = temperature, similarity
        self.contrast_weight, self.mlm_weight = contrast_weight, mlm_weight
        if not self.streams:  # nothing reads the MLM head
            used = set(lm.base_model.parameters())
            for weight in lm.parameters():
                weight.requires_grad_(weight in used and weight.requires_grad)

    def terms_of(self, states: tuple[Tensor, Tensor, Tensor], batch: dict[str, Any], score: bool) -> dict[str, Term]:
        terms = super().terms_of(states, batch, score)
        return {name: term._replace(weight=self.mlm_weight) for name, term in terms.items()}

    def contrast(self, cls: Tensor) -> Term:
        """Cross-entropy of each vector ``[N, H]`` against its sibling among all others; siblings are 2i and 2i + 1."""
        scores = pair_scores(cls, self.similarity == "cosine") / self.temperature
        losses, correct = pair_losses(scores)
        measures = pair_measures(cls, scores)
        return Term(losses.sum(), "n_sequences", self.contrast_weight, correct=correct, measures=measures)
