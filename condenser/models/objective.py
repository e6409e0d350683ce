"""What is minimised: sums of losses over a pass, by name.

An objective is a file beside this one with a subclass of `Objective`, which a YAML names. A step computes several
passes, on one device or many, so a loss is a *sum*; the training step divides it by how many of them the whole step
has: minimised is the sum over terms of ``weight * sum / count``.

Legend: B sequences, L padded length, T tokens, M masked tokens, H hidden size.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from condenser.models.attention import Bounds, Sequences, sequences_of, take
from condenser.models.backbones.base import backbone_of, with_subclasses
from condenser.models.flops import Work
from condenser.models.losses import token_losses

COUNTS = ("n_masked", "n_tokens", "n_sequences", "n_ordinary")  # host ints of every pass that a term may be divided by


class Term(NamedTuple):
    """A summand of the objective over one pass; dummies add nothing to it."""

    sum: Tensor  # fp32 scalar
    over: str = "n_masked"  # which of the step's `COUNTS` makes it a mean
    weight: float = 1.0
    losses: Tensor | None = None  # of each masked token (or whatever it sums over), with ``score`` alone
    correct: Tensor | None = None  # bool, likewise
    measures: Mapping[str, Tensor] = MappingProxyType({})  # of a contrast: means, logged under these names


class Objective(nn.Module):
    """A masked LM and what is trained on it.

    The further arguments of a subclass are settings (`model.objective_options`); it keeps them as attributes of the
    same names, by which checkpoints and exports know them. What it has of weights beside ``lm`` is its head.

    Args:
        lm: a Hugging Face masked LM, which is kept, not copied.
    """

    head_term = ""  # the one whose head reads [CLS], by ``cls_hook``: see `condenser.evaluation.probes`
    asks: ClassVar[tuple[str, ...]] = ()  # for what else of `condenser.data.collate.EXTRAS`
    pruned = True  # the last layer is run at the queries alone
    # An objective over the [CLS] vectors of the whole step ``[N, H]``, in which those of siblings, two spans of one
    # document, are at 2i and 2i + 1, has a method for it. Its term is over ``n_sequences``.
    contrast: Callable[[Tensor], Term] | None = None

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm, self.backbone = lm, backbone_of(lm)
        self.n_layers = len(self.backbone.layers)  # and those of a head
        self.gradient_checkpointing = False  # recompute every layer in the backward pass, with the same dropout
        self.fused_loss = False  # see `token_losses`
        drops = (module.p for module in lm.modules() if isinstance(module, nn.Dropout))
        self.has_dropout = max(drops, default=0.0) > 0

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with besides ``lm``. Raises ValueError where a class does not keep one."""
        names = setting_names(type(self))
        if lost := [name for name in names if not hasattr(self, name)]:
            raise ValueError(
                f"{type(self).__name__} does not keep its setting {', '.join(lost)}: set self.{lost[0]} in __init__, "
                "or checkpoints and exports do not know it"
            )
        settings = {name: getattr(self, name) for name in names}
        for name, value in settings.items():
            try:
                json.dumps(value)
            except TypeError:
                raise ValueError(
                    f"{type(self).__name__}: its setting {name} is a {type(value).__name__}, unfit for checkpoints: "
                    "settings are numbers, texts, lists, mappings"
                ) from None
        return settings

    def head_state(self) -> dict[str, Tensor]:
        """Its weights but those of ``lm``, by name."""
        return {name: weight for name, weight in self.state_dict().items() if not name.startswith("lm.")}

    @classmethod
    def from_masked_lm(cls, lm: PreTrainedModel, **settings: Any) -> Self:
        return cls(lm, **settings).train(lm.training)

    def losses(self, batch: dict[str, Any], score: bool = False) -> dict[str, Term]:
        """The terms of a flat pass (`condenser.data.collate.collate` says what is in it).

        It may be compiled, and replayed as a CUDA graph: of the batch's host ints it reads ``max_seqlen`` and
        ``max_query`` alone, and it does not ask for values of tensors.
        """
        return self.cls_and_losses(batch, score)[1]

    def cls_states(self, batch: dict[str, Any]) -> Tensor:
        """The last [CLS] states ``[B, H]`` of a flat pass, and nothing that they do not need."""
        if self.has_dropout and self.training:  # which must be drawn for as many positions as in `cls_and_losses`
            late, _, _ = self.encoded(batch, pruned=self.pruned)
            return self.cls_of(late, batch, self.pruned)
        batch = read_at_cls(batch)
        return self.cls_of(self.encoded(batch)[0], batch)

    def cls_and_losses(self, batch: dict[str, Any], score: bool = False) -> tuple[Tensor, dict[str, Term]]:
        """Both of one forward pass; with the same dropout the states are those of `cls_states`."""
        raise ValueError(f"{type(self).__name__} needs a method losses, or for a contrast cls_and_losses")

    def encoded(self, batch: dict[str, Any], keep: int = 0, pruned: bool = True) -> tuple[Tensor, Tensor, Sequences]:
        """A flat pass through the backbone.

        Args:
            keep: the layer whose output is kept as the early states; 0 for the embeddings.
            pruned: run the last layer at the queries alone.

        Returns:
            last states ``[T, H]``, or ``[Q, H]`` where ``pruned``; early ones ``[T, H]``; the sequences.
        """
        early = late = self.backbone.embed(batch["input_ids"], batch["position_ids"], batch.get("token_type_ids"))
        as_they_lie = self.backbone.has_kernel and not self.backbone.dropped(self.backbone.layers[0])
        sequences = sequences_of(batch, late, as_they_lie)
        layers = self.backbone.layers
        for depth, layer in enumerate(layers, start=1):
            late = self.run(layer, late, sequences, at_queries=pruned and depth == len(layers))
            if depth == keep:
                early = late
        return self.backbone.last(late), early, sequences

    def cls_of(self, late: Tensor, batch: dict[str, Any], pruned: bool = True) -> Tensor:
        """The [CLS] states ``[B, H]`` among the last ones."""
        return take(late, batch["cu_seqlens_query" if pruned else "cu_seqlens"][:-1])

    def flops(self, work: Work) -> float:
        """Operations that training on so much needs."""
        raise ValueError(
            f"{type(self).__name__} needs a method flops: operations, for perf/mfu and `condenser estimate`"
        )

    def scored_share(self, masked: float) -> float:
        """Tokens at which the vocabulary is scored, of all, where a share of them is ``masked``: for memory."""
        return 2 * masked

    def mlm_terms(self, streams: dict[str, tuple[Tensor, Tensor, str]], score: bool) -> dict[str, Term]:
        """The MLM head's cross-entropies of several streams, by one product with the vocabulary: of each its states
        ``[M, H]``, targets ``[M]`` (-100 where there is none), and what it is over."""
        hidden = self.backbone.transform(torch.cat([states for states, _, _ in streams.values()]))
        targets = torch.cat([wanted for _, wanted, _ in streams.values()])
        fused = self.fused_loss and torch.is_grad_enabled()  # validation wants its losses in fp32
        losses, correct = token_losses(hidden, self.backbone.decoder, targets, fused, score)
        terms, first = {}, 0
        for name, (states, _, over) in streams.items():
            own = slice(first, first := first + len(states))
            terms[name] = Term(losses[own].sum(), over)
            if correct is not None:
                terms[name] = terms[name]._replace(losses=losses[own].detach(), correct=correct[own])
        return terms

    def run(self, layer: Any, hidden: Tensor, sequences: Sequences, at_queries: bool = False) -> Tensor:
        """A layer's output ``[T, H]``, or ``[Q, H]`` at the queries alone."""
        run = getattr(layer, "run", None)  # where weights are sharded, a method that gathers them: see sharding.py
        return self.recomputed(run or partial(self.backbone.run, layer), hidden, sequences, at_queries)

    def run_cross(self, layer: Any, query: Tensor, context: Tensor, rows: Bounds, position_ids: Tensor) -> Tensor:
        """A layer whose queries are those states ``[T, H]`` and whose keys and values are these."""
        return self.recomputed(self.backbone.run_cross, layer, query, context, rows, position_ids)

    def recomputed(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """A layer's output, whose parts are computed again in the backward pass where that is asked for."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(run, *arguments, use_reentrant=False)
        return run(*arguments)


def identity(cls: Tensor) -> Tensor:
    return cls


def check_terms(objective: Objective, terms: Any) -> None:
    """Raises ValueError for what are no terms by name, a term over what is not counted, or a sum that is no scalar."""
    if not isinstance(terms, dict) or not all(isinstance(term, Term) for term in terms.values()):
        raise ValueError(f"{type(objective).__name__}: losses must return Terms by name, not {terms!r:.100}")
    if not terms and objective.contrast is None:
        raise ValueError(f"{type(objective).__name__}: losses returned no term")
    for name, term in terms.items():
        if term.over not in COUNTS:
            raise ValueError(f"term {name!r}: over={term.over!r} must be one of {', '.join(COUNTS)}")
        if not isinstance(term.sum, Tensor) or term.sum.dim():
            raise ValueError(f"term {name!r}: sum must be a tensor that is a scalar, not {term.sum!r:.100}")


def setting_names(objective: type[Objective]) -> list[str]:
    """The arguments of a class besides ``lm``, and those of its bases where it passes others on to them."""
    names: list[str] = []
    for each in objective.__mro__:
        if "__init__" in vars(each):
            parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return [name for name in dict.fromkeys(names) if name not in ("self", "lm")]


def class_path(objective: type[Objective]) -> str:
    return f"{objective.__module__}.{objective.__qualname__}"


def class_of(model: Objective) -> type[Objective]:
    """Its own class: where weights are sharded torch has put one of its making before it."""
    return next(each for each in type(model).__mro__ if not each.__module__.startswith("torch."))


def is_ours(model: Objective | None) -> bool:
    return model is not None and class_of(model).__module__.startswith("condenser.")


def known_class(path: str) -> type[Objective] | None:
    """The class of this path if it is one of ours or was imported. (A path that a file holds is not imported: it could
    run anything.)"""
    return next((known for known in with_subclasses(Objective) if class_path(known) == path), None)


def known_options(objective: type[Objective], usual: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What a class is made with: ``options``, and of ``usual`` what it takes.

    Raises:
        ValueError: an option that it does not take.
    """
    takes = setting_names(objective)
    first = next(each for each in objective.__mro__ if {"losses", "cls_and_losses"} & vars(each).keys())
    if objective.contrast is not None and "cls_and_losses" not in vars(first):
        raise ValueError(f"{objective.__name__} has a contrast: let it override cls_and_losses, not losses")
    if unknown := [name for name in options if name not in takes]:
        raise ValueError(
            f"{objective.__name__} has no setting {', '.join(unknown)}; it has {', '.join(takes) or 'none'}"
        )
    return {name: value for name, value in usual.items() if name in takes} | options


def read_at_cls(batch: dict[str, Any]) -> dict[str, Any]:
    """The pass with no other queries than [CLS]."""
    bounds = batch["cu_seqlens"]
    queries = torch.arange(len(bounds), device=bounds.device)
    return {**batch, "query_index": bounds[:-1], "cu_seqlens_query": queries, "max_query": 1}
