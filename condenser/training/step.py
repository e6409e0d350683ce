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

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from condenser.data.collate import Fields, StepBatch
from condenser.data.hashing import hash_ints
from condenser.models.dropout import Seeds
from condenser.models.losses import at_least_fp32
from condenser.models.objective import COUNTS, Objective, Term, check_terms

Shares = dict[str, Tensor]  # of a pass in the step's means: "mlm_loss", and with score "mlm_accuracy", ... of each term
OF_CLS, OF_WEIGHT = "gradient of [CLS]", "gradient of weight "  # that are known before a pass


class PassResult(NamedTuple):
    """What one pass gave."""

    loss: Tensor
    shares: Shares
    cls: Tensor | None = None  # [B, H], of an objective with a contrast


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


def added_up(passes: list[PassResult]) -> StepResult:
    shares: Shares = {}
    for each in passes:
        for name, value in each.shares.items():
            shares[name] = shares[name] + value if name in shares else value
    return StepResult(torch.stack([each.loss.detach() for each in passes]), shares)


def inputs_of(fields: Fields) -> Fields:
    """What the objective sees: no host ints that change from pass to pass, for which it would be compiled anew."""
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor) and name != "sample_ids"}
    return tensors | {name: fields[name] for name in ("max_seqlen", "max_query")}


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


class Replays:
    """Passes as CUDA graphs: captured once for each shape, then replayed on new inputs, at one launch each. Where one
    cannot be captured, passes are run without.

    Args:
        run: forward and backward of a pass; adds to ``gradients``, whose buffers stay.
    """

    def __init__(self, run: Callable[[Fields, Tensor, bool], PassResult], gradients: list[Tensor]):
        self.run, self.gradients, self.failed = run, gradients, False
        self.captured: dict[Any, tuple[Any, Fields, Tensor, PassResult]] = {}
        self.pool: Any = None  # memory that all graphs share: one is replayed at a time

    def __call__(self, inputs: Fields, scale: Tensor, score: bool) -> PassResult:
        shape = (score, *(value.shape if isinstance(value, Tensor) else value for value in inputs.values()))
        if shape not in self.captured and not self.failed:
            self.capture(shape, inputs, scale, score)
        if self.failed:
            return self.run(inputs, scale, score)
        graph, own, own_scale, (loss, shares, _) = self.captured[shape]
        torch._foreach_copy_(tensors(own), tensors(inputs))
        own_scale.copy_(scale)
        graph.replay()
        own_shares = {name: value.clone() for name, value in shares.items()}  # the next replay writes to `shares`
        return PassResult(loss.clone(), own_shares)

    def capture(self, shape: Any, inputs: Fields, scale: Tensor, score: bool) -> None:
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        own_scale, before = scale.clone(), [gradient.clone() for gradient in self.gradients]
        state, cached = torch.cuda.get_rng_state(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # else weights in half precision would stay what they are now
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is compiled, tuned or allocated at first must be so before
                for _ in range(2):
                    self.run(own, own_scale, score)
            torch.cuda.current_stream().wait_stream(stream)
            # other threads, as the one that pins memory for the loader, go on allocating
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                found = self.run(own, own_scale, score)
            self.captured[shape], self.pool = (graph, own, own_scale, found), self.pool or graph.pool()
        except RuntimeError as error:
            self.failed = True
            message = str(error).splitlines()[0]
            print(f"passes are not replayed as CUDA graphs (model.cuda_graphs): {message}", file=sys.stderr)
        finally:
            torch.set_autocast_cache_enabled(cached)
            torch._foreach_copy_(self.gradients, before)
            torch.cuda.set_rng_state(state)


def tensors(fields: Fields) -> list[Tensor]:
    return [value for value in fields.values() if isinstance(value, Tensor)]
