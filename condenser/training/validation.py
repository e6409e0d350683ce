"""What a validation measures: means over the whole split, the same on any number of devices."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from condenser.data.collate import StepBatch
from condenser.models.objective import Objective, Term
from condenser.training.guard import on_all_devices
from condenser.training.passes import cls_and_terms, gathered, inputs_of


class Validation:
    """One validation.

    Args:
        unigram_nats: of each token id ``[V]``, what guessing by frequency costs.
        mask_id: of [MASK].
    """

    def __init__(self, model: Objective, unigram_nats: Tensor, mask_id: int):
        self.model, self.unigram_nats, self.mask_id = model, unigram_nats, mask_id
        self.means: dict[str, MeanMetric] = {}
        self.weights: dict[str, float] = {}  # of terms

    def add(self, batch: StepBatch, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Count a step; ``all_reduce`` adds up a tensor over all devices."""
        model, counted = self.model, []
        for fields in batch:
            cls, terms = cls_and_terms(model, inputs_of(fields), score=True)
            if fields.get("again"):
                continue
            counted.append((fields, cls))
            at_mask = fields["input_ids"][fields["masked_index"]] == self.mask_id
            self.mean("unigram_loss_at_mask").update(self.unigram_nats[fields["labels"]][at_mask])
            for name, term in terms.items():
                self.add_term(name, term, fields[term.over])
                if term.losses is not None and term.over == "n_masked":
                    self.mean(f"{name}_loss_at_mask").update(term.losses[at_mask])
        if model.contrast is not None:
            everything = gathered(model, counted, batch, all_reduce)  # type: ignore[arg-type]
            if len(everything) > 2:  # a document alone is told from no other
                self.add_term("contrast", model.contrast(everything), len(everything))

    def add_term(self, name: str, term: Term, n: int) -> None:
        """Count a term over ``n``."""
        self.weights[name] = term.weight
        self.mean(f"{name}_loss").update(term.sum / max(n, 1), n)
        if term.correct is not None:
            self.mean(f"{name}_accuracy").update(term.correct.float())
        for measure, value in term.measures.items():
            self.mean(measure).update(value, n)

    def mean(self, name: str) -> MeanMetric:
        """Made where it is asked for first."""
        if name not in self.means:
            self.means[name] = MeanMetric().to(self.unigram_nats.device)
        return self.means[name]

    def result(self) -> dict[str, Tensor]:
        """All means, and of the terms the weighted sum, which is minimised: ``loss``."""
        own = {name: self.weights.get(name.removesuffix("_loss")) for name in self.means}
        # in one order everywhere; a device may have no row, and know of none
        known = {name: weight for each in on_all_devices(own) for name, weight in each.items()}
        found = {name: self.mean(name).compute() for name in known}
        found = {name: mean for name, mean in found.items() if not (name.endswith("at_mask") and mean.isnan())}
        terms = [weight * found[name] for name, weight in known.items() if weight is not None]
        return found | ({"loss": torch.stack(terms).sum()} if terms else {})
