"""One pass: from its arrays to what is minimised of it, and what a contrast over all passes of a step needs of it.

Losses are sums; ``scale`` makes them means over the step's masked tokens (tokens, sequences) on all devices.

Legend: B sequences of a pass, N of the step on all devices, H hidden size.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from condenser.data.collate import Fields, StepBatch
from condenser.data.shapes import filled, rounded
from condenser.data.steps import Steps
from condenser.models.losses import at_least_fp32
from condenser.models.objective import COUNTS, Objective, Term, check_terms

Shares = dict[str, Tensor]  # of a pass in the step's means: "mlm_loss", and with score "mlm_accuracy", ... of each term
OF_CLS, OF_WEIGHT = "gradient of [CLS]", "gradient of weight "  # that are known before a pass


class PassResult(NamedTuple):
    """What one pass gave."""

    loss: Tensor
    shares: Shares
    cls: Tensor | None = None  # [B, H], of an objective with a contrast


def inputs_of(fields: Fields) -> Fields:
    """What the objective sees: no host ints that change from pass to pass, for which it would be compiled anew."""
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor) and name != "sample_ids"}
    return tensors | {name: fields[name] for name in ("max_seqlen", "max_query")}


def pass_loss(objective: Objective, inputs: Fields, scale: Tensor, score: bool) -> PassResult:
    """What is minimised, and what each term has of it."""
    loss, shares = scale.new_zeros(()), {}
    cls, terms = cls_and_terms(objective, inputs, score)
    for name, term in terms.items():
        to_mean = scale[COUNTS.index(term.over)]
        mean = term.sum * to_mean
        loss = loss + term.weight * mean
        shares[f"{name}_loss"] = mean.detach()
        if term.correct is not None:
            shares[f"{name}_accuracy"] = term.correct.sum() * to_mean
    return PassResult(with_surrogate(loss, objective, cls, inputs), shares, cls)


def cls_and_terms(objective: Objective, inputs: Fields, score: bool) -> tuple[Tensor | None, dict[str, Term]]:
    """The terms of a pass, and where they are to be contrasted its [CLS] vectors ``[B, H]``."""
    if objective.contrast is not None:
        cls, terms = objective.cls_and_losses(inputs, score)
    else:
        cls, terms = None, objective.losses(inputs, score)
    check_terms(objective, terms)
    return cls, terms


def with_surrogate(loss: Tensor, objective: Objective, cls: Tensor | None, known: Fields) -> Tensor:
    """``loss``, with the gradients that are ``known`` of ``cls`` ``[B, H]`` and of weights, by a summand that is 0."""
    pull = loss.new_zeros(())
    for name, gradient in known.items():
        if name == OF_CLS:
            assert cls is not None
            pull = pull + (at_least_fp32(cls) * gradient).sum()
        elif name.startswith(OF_WEIGHT):
            pull = pull + (objective.get_parameter(name.removeprefix(OF_WEIGHT)) * gradient).sum()
    return loss + (pull - pull.detach())


def gathered(
    objective: Objective,
    passes: Iterable[tuple[Fields, Tensor]],
    batch: StepBatch,
    all_reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """The vectors ``[B, H]`` of this device's ``passes``, and those of all other devices, in the order of the step:
    ``[N, H]``, of weights' type."""
    n, width = batch.n_sequences, objective.lm.config.hidden_size
    dtype = next(objective.parameters()).dtype
    everything = torch.zeros(n + 1, width, dtype=dtype, device=batch.buffer.device)  # dummies are put at the end
    for fields, some in passes:
        everything.index_copy_(0, fields["slots"], some.detach().to(dtype))
    return all_reduce(everything[:n])


def contrast_means(term: Term, n: int) -> Shares:
    """What is logged of a contrast over ``n`` vectors."""
    means = {"contrast_loss": term.sum.detach() / n}
    if term.correct is not None:
        means["contrast_accuracy"] = term.correct.float().mean()
    return means | dict(term.measures)


@torch.no_grad()
def check_dummies(objective: Objective, steps: Steps, device: torch.device) -> None:
    """See on a few samples that dummy sequences, which fill passes up, add nothing to an objective.

    Raises:
        ValueError: they do. (What differs from one time to the next cannot be told from that, and goes through.)
    """
    alone = steps.one_pass(0, steps.batches.step(0)[0][:8])
    found, is_training = [], objective.training
    objective.eval()
    for fields in (alone, alone, filled(alone, rounded(alone))):
        (on_device,) = StepBatch.of([fields]).to(device)
        _, terms = cls_and_terms(objective, inputs_of(on_device), score=False)
        found.append({name: term.sum.item() for name, term in terms.items()})
    objective.train(is_training)
    for name, value in found[0].items():
        if value == found[1][name] and not math.isclose(value, found[2][name], rel_tol=1e-3, abs_tol=1e-3):
            raise ValueError(
                f"term {name!r}: dummy sequences, which fill passes up, add to it ({value:.5g} without them, "
                f"{found[2][name]:.5g} with one): leave out those whose batch['real'] [B] is 0, which is there where "
                'asks = ("real",); see docs/change-objective.md'
            )
