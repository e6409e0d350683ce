"""The optimizer and its schedule. The defaults are the paper's: AdamW, linear warm-up, linear decay."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from condenser.models.backbones.base import depths
from condenser.training.failures import one_line


@dataclass
class Optimization:
    """Settings of the optimizer.

    Args:
        learning_rate: its peak, reached at the end of the warm-up.
        weight_decay: decoupled decay of all weights but biases and LayerNorm's.
        warmup_fraction: share of all steps over which the rate rises from 0.
        schedule: after the warm-up, fall to 0 linearly or as a cosine, stay constant, or stay and then fall linearly
            over the last decay_fraction of the steps (warmup-stable-decay).
        decay_fraction: see schedule.
        gradient_clip: largest norm of the whole gradient; 0 leaves it as it is.
        betas: decay rates of AdamW's moments.
        eps: AdamW's epsilon.
        layer_decay: the rate of each layer is that of the layer above it times this; embeddings lie below layer 1.
        head_learning_rate: the head's own peak; learning_rate by default.
        head_only_steps: at first train the head alone, for a fresh one on a trained backbone.
        decay_to_start: decay the backbone's weights toward their starting values instead of zero.
        optimizer: class path of another optimizer than AdamW, which is given lr, weight_decay and optimizer_options.
        optimizer_options: its further arguments.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    decay_fraction: float = 0.1
    gradient_clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0
    head_learning_rate: float | None = None
    head_only_steps: int = 0
    decay_to_start: bool = False
    optimizer: type[Optimizer] = AdamW
    optimizer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, value in (("learning_rate", self.learning_rate), ("head_learning_rate", self.head_learning_rate)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"optimizer.{name}={value} must be positive and finite")
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay={self.layer_decay} must be above 0 and at most 1")
        for name in ("weight_decay", "gradient_clip", "head_only_steps", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative or infinite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must be at least 0 and below 1")
        if self.decay_to_start and self.optimizer is not AdamW:
            raise ValueError("optimizer.decay_to_start needs AdamW, whose weight decay it turns to another target")
        try:
            inspect.signature(self.optimizer).bind_partial(**self.optimizer_options)
        except TypeError as error:
            raise ValueError(f"optimizer.optimizer_options of {self.optimizer.__name__}: {error}") from None

    def made(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of these groups of weights."""
        usual = {"betas": self.betas, "eps": self.eps, "fused": True} if self.optimizer is AdamW else {}
        make: Any = self.optimizer
        return make(groups, lr=self.learning_rate, **usual | self.optimizer_options)

    def try_out(self, device: Any) -> None:
        """Raises ValueError for an optimizer that can be made but takes no step as we do: of sparse gradients, of
        matrices alone, or with a closure."""
        weights = [nn.Parameter(torch.zeros(size, device=device)) for size in ((2, 2), (2,))]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        try:
            self.made([{"params": [weight], "weight_decay": 0.0} for weight in weights]).step()
        except Exception as error:
            name = self.optimizer.__name__
            raise ValueError(f"model.optimizer.optimizer={name} takes no step: {one_line(error)}") from error


def build_optimizer(module: nn.Module, settings: Optimization, start: dict[str, Tensor] | None = None) -> Optimizer:
    """An optimizer over the trainable weights of ``module``, which holds an objective as ``model``.

    Weights of one rate and one weight decay form a group.

    Args:
        start: the model's weights by name as they were before the first step, for ``decay_to_start``.
    """
    model: Any = module.model
    in_head, layers_above = set(model.parameters()) - set(model.lm.parameters()), depths(model.lm)
    if settings.head_only_steps and not in_head:
        raise ValueError(f"optimizer.head_only_steps={settings.head_only_steps}: there is no head to train alone")
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        head = parameter in in_head
        rate = settings.learning_rate * settings.layer_decay ** layers_above.get(parameter, 0)
        if head and settings.head_learning_rate is not None:
            rate = settings.head_learning_rate
        waits = settings.head_only_steps > 0 and not head  # until the head has had its steps
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0  # none on biases and LayerNorm
        groups.setdefault((waits, rate, decay), []).append(parameter)
    of_groups = [
        {"params": parameters, "lr": rate, "weight_decay": decay, "waits": waits}
        for (waits, rate, decay), parameters in groups.items()
    ]
    optimizer = settings.made(of_groups)
    if settings.decay_to_start:
        assert start is not None
        targets = {(p := model.get_parameter(name)): value.to(p.device) for name, value in start.items()}
        optimizer.register_step_post_hook(lambda optimizer, *_: decay_to(targets, optimizer))
    return optimizer


def in_model_order(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state with the weights numbered as in ``module``, not by groups: as sharded training reads it."""
    places = {parameter: place for place, parameter in enumerate(module.parameters())}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [number for group in state["param_groups"] for number in group["params"]]
    place_of = {number: places[parameter] for number, parameter in zip(saved, own, strict=True)}
    return {
        "state": {place_of.get(key, key): values for key, values in state["state"].items()},  # some keep more, by name
        "param_groups": [
            {**group, "params": [place_of[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def decay_to(targets: dict[nn.Parameter, Tensor], optimizer: Optimizer) -> None:
    """Turn a step's decoupled decay toward zero into one toward ``targets``: AdamW took off rate * decay * weight, but
    where it has left out the step."""
    skipped: Any = getattr(optimizer, "found_inf", None)
    with torch.no_grad():
        for group in optimizer.param_groups:
            share = group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter in targets and skipped is None:
                    parameter.add_(targets[parameter], alpha=share)
                elif parameter in targets:
                    parameter.addcmul_(targets[parameter], (1 - skipped) * share)


def build_schedule(optimizer: Optimizer, settings: Optimization, total_steps: int) -> LambdaLR:
    """The rate of each step as a share of its peak; 0 for the backbone while the head is trained alone."""
    warmup_steps = round(settings.warmup_fraction * total_steps)
    decay_steps = round(settings.decay_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))  # 1 after the warm-up, 0 at the end
        if settings.schedule == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        if settings.schedule == "constant":
            return 1.0
        if settings.schedule == "wsd":
            return max(0.0, min(1.0, (total_steps - step) / max(1, decay_steps)))
        return left

    def later(step: int) -> float:
        return 0.0 if step < settings.head_only_steps else factor(step)

    return LambdaLR(optimizer, [later if group["waits"] else factor for group in optimizer.param_groups])
