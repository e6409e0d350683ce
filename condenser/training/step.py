"""One optimizer step of one device: forward and backward of its passes, clipping, the update.

`fit`, the benchmark and the rehearsal of an estimate all train by this. The host never waits for the device here.
Losses are sums; ``scale`` makes them means over the step's masked tokens (tokens, sequences) on all devices, so it does
not matter how many passes and devices there are. Gradients stay where they are and are zeroed in place.

A pass is, by choice: operations one after the other; one compiled function from ids to loss (`torch.compile` with
static shapes); or that function's forward and backward replayed as a CUDA graph.

An objective with a contrast of [CLS] vectors takes two phases (gradient caching, Gao et al. 2021): all vectors of the
step, by a pass without gradients; the contrast, and from it the gradient of each vector; then each pass with its own
losses, into which its vectors are given these gradients. So the contrast is over the whole step on all devices, and
memory is that of a pass. Where a device's part of the step is one pass, its vectors are those of that pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from condenser.data.collate import Fields, StepBatch
from condenser.data.hashing import hash_ints
from condenser.models.dropout import Seeds
from condenser.models.objective import COUNTS, Objective, Term
from condenser.training.passes import (
    OF_CLS,
    OF_WEIGHT,
    PassResult,
    Shares,
    contrast_means,
    gathered,
    inputs_of,
    pass_loss,
    with_surrogate,
)
from condenser.training.replay import Replays


class StepResult(NamedTuple):
    """What the passes of a step gave on this device. Summed over devices these are the step's means."""

    losses: Tensor  # [passes], of what is minimised, and where there is one the contrast's
    shares: Shares  # over the passes


class TrainingStep:
    """Takes steps.

    Args:
        objective: what is minimised.
        optimizer: over its weights.
        clip: largest norm of the whole gradient; 0 leaves it as it is.
        seed: of dropout, which is a function of (seed, step, pass).
        compiled: compile a pass, anew for each of its shapes.
        replayed: replay passes as CUDA graphs.
        backward: how the gradient of a loss is taken.
        no_sync: a context for the backward passes after which devices need not agree yet: all but the last.
        all_reduce: adds up a tensor over all devices.
        gradient_cache: compute the vectors of a contrast twice, rather than keep all passes in memory until it is
            known; by default where there are several.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        *,
        clip: float = 0.0,
        seed: int = 0,
        compiled: bool = False,
        replayed: bool = False,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
        all_reduce: Callable[[Tensor], Tensor] = lambda values: values,
        gradient_cache: bool | None = None,
    ):
        self.objective, self.optimizer, self.clip, self.seed = objective, optimizer, clip, seed
        self.backward, self.no_sync, self.all_reduce = backward, no_sync, all_reduce
        self.gradient_cache = gradient_cache
        self.always_score = compiled  # else there would be two graphs of a pass
        self.pass_loss, self.cls_states = pass_loss, objective.cls_states
        self.seeds = Seeds(objective) if compiled else None
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # shapes; 8 by default
            self.pass_loss = torch.compile(pass_loss, dynamic=False, fullgraph=True)
            self.cls_states = torch.compile(objective.cls_states, dynamic=False, fullgraph=True)
        # those of the objective may for now be put together from the shards that are trained
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        named = objective.named_parameters()
        self.of_head = {name: p for name, p in named if not name.startswith("lm.") and p.requires_grad}
        self.gradients: list[Any] = [torch.zeros_like(weight) for weight in self.weights]
        self.replays = Replays(self.one_pass, self.gradients) if replayed else None

    def attach(self) -> None:
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient

    def take(
        self,
        batch: StepBatch,
        scale: Tensor,
        score: bool = False,
        watch: Callable[[Tensor, Tensor], Tensor] | None = None,
        update: Callable[[], Any] | None = None,
    ) -> tuple[StepResult, Tensor]:
        """One step; gives the norm of its gradient too.

        Args:
            scale: ``[4]``, 1 over the step's `COUNTS` (times what averaging over devices takes away).
            score: count right predictions too.
            watch: of the losses ``[passes]`` and the norm, says (1.0) that the step is not to be taken.
            update: calls the optimizer, whose own ``step`` it is by default.
        """
        passes = self.passes(batch, scale, score)
        norm: Any = nn.utils.get_total_norm(self.gradients, foreach=True)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.update(norm, watch(passes.losses, norm) if watch else None, update or self.optimizer.step)
        return passes, norm

    def passes(self, batch: StepBatch, scale: Tensor, score: bool) -> StepResult:
        """Add the gradients of all passes to what is in ``.grad``."""
        if self.weights[-1].grad is not self.gradients[-1]:  # at first, or where somebody has let go of them
            self.attach()
        score = score or self.always_score
        if self.objective.contrast is None:
            return added_up(self.one_by_one(batch, scale, score))
        cached = len(batch) > 1 if self.gradient_cache is None else self.gradient_cache
        if cached:
            with torch.no_grad():
                vectors = [self.seeded(self.cls_states, fields) for fields in batch]
            contrast, known = self.contrast(vectors, batch, scale)
            return added_up([*self.one_by_one(batch, scale, score, known), contrast])
        forwards = [self.seeded(self.forward, fields, scale, score) for fields in batch]
        contrast, known = self.contrast([each.cls for each in forwards], batch, scale)
        for number, each in enumerate(forwards):
            with self.sync_context(number, batch):
                self.backward(with_surrogate(each.loss, self.objective, each.cls, known[number]))
        return added_up([*forwards, contrast])

    def one_by_one(
        self, batch: StepBatch, scale: Tensor, score: bool, known: list[Fields] | None = None
    ) -> list[PassResult]:
        """Forward and backward of each pass; of an objective with a contrast, with the gradients that are ``known``."""
        done = []
        for number, fields in enumerate(batch):
            more = {} if known is None else known[number]
            with self.sync_context(number, batch):
                done.append(self.seeded(self.replays or self.one_pass, fields | more, scale, score))
        return done

    def sync_context(self, number: int, batch: StepBatch) -> AbstractContextManager:
        """For a backward pass: devices agree in the last one of a step."""
        return nullcontext() if number == len(batch) - 1 else self.no_sync()

    def seeded(self, run: Callable[..., Any], fields: Fields, *arguments: Any) -> Any:
        """``run`` on what the objective sees of a pass, with its dropout."""
        seed_dropout(self.weights[0].device, dropout_seed(self.seed, fields["step"], fields["micro_batch"]))
        if self.seeds:
            self.seeds.draw()
        return run(inputs_of(fields), *arguments)

    def forward(self, inputs: Fields, scale: Tensor, score: bool) -> PassResult:
        return self.pass_loss(self.objective, inputs, scale, score)

    def one_pass(self, inputs: Fields, scale: Tensor, score: bool) -> PassResult:
        loss, shares, _ = self.forward(inputs, scale, score)
        self.backward(loss)
        return PassResult(loss.detach(), shares)

    def contrast(self, vectors: list[Tensor], batch: StepBatch, scale: Tensor) -> tuple[PassResult, list[Fields]]:
        """The contrast of the step, and for each pass of this device the gradients of its vectors ``[B, H]``, and its
        share of those of weights that the contrast has of its own. It is computed whole on every device, so that
        nothing but vectors has to be exchanged."""
        own = self.of_head
        everything = gathered(self.objective, zip(batch, vectors, strict=True), batch, self.all_reduce).requires_grad_()
        with torch.enable_grad():
            term: Term = self.objective.contrast(everything)  # type: ignore[misc]
            if term.over != "n_sequences":
                raise ValueError(f"contrast: over={term.over!r} must be 'n_sequences'")
            minimised = term.sum * term.weight
        gradient, *others = torch.autograd.grad(minimised, [everything, *own.values()], allow_unused=True)
        shares = contrast_means(term, len(everything))
        contrast = PassResult(term.weight * shares["contrast_loss"], shares)
        if gradient is None:  # it does not look at them
            return contrast, [{} for _ in batch]
        gradient = F.pad(gradient * scale[COUNTS.index(term.over)], (0, 0, 0, 1))  # that of dummies, 0
        n = len(everything) * len(batch)  # of a mean, shared out over the passes; devices all have the same
        known = {OF_WEIGHT + name: g / n for name, g in zip(own, others, strict=True) if g is not None}
        return contrast, [{OF_CLS: gradient.index_select(0, fields["slots"]), **known} for fields in batch]

    def update(self, norm: Tensor, skipped: Tensor | None, update: Callable[[], Any]) -> None:
        """Clip, update and zero the gradient; where it is ``skipped`` an optimizer that works on the device leaves the
        weights as they are."""
        optimizer: Any = self.optimizer
        excess = ((norm.float() + 1e-6) / self.clip).clamp(min=1.0) if self.clip else None
        if skips_on_device(optimizer):
            optimizer.found_inf, optimizer.grad_scale = skipped, excess
        elif excess is not None:
            torch._foreach_div_(self.gradients, excess)
        update()
        torch._foreach_zero_(self.gradients)


def added_up(passes: list[PassResult]) -> StepResult:
    shares: Shares = {}
    for each in passes:
        for name, value in each.shares.items():
            shares[name] = shares[name] + value if name in shares else value
    return StepResult(torch.stack([each.loss.detach() for each in passes]), shares)


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """What dropout is drawn from in one pass of one step, whichever device computes it."""
    return int(hash_ints(seed, step, micro_batch) >> 1)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seeds the device's own generator; `torch.manual_seed` takes 0.7 ms for those of all kinds of devices."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether a step is left out where the optimizer's ``found_inf`` is 1.0, without asking the device."""
    return bool(optimizer.defaults.get("fused"))
