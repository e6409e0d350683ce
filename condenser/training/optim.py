"""The optimizer and its schedule, as in the paper: AdamW, linear warm-up, linear decay."""

from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class Optimization:
    """Settings of the optimizer.

    Args:
        learning_rate: its peak, reached at the end of the warm-up.
        weight_decay: decoupled decay of all weights but biases and LayerNorm's.
        warmup_fraction: share of all steps over which the rate rises from 0; it then falls linearly to 0.
        gradient_clip: largest norm of the whole gradient; 0 leaves it as it is.
        betas: decay rates of AdamW's moments.
        eps: AdamW's epsilon.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    gradient_clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must be positive")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"optimizer.warmup_fraction={self.warmup_fraction} must lie between 0 and 1")
        if min(self.weight_decay, self.gradient_clip) < 0:
            raise ValueError("optimizer.weight_decay and optimizer.gradient_clip must not be negative")


def build_optimizer(module: nn.Module, settings: Optimization) -> AdamW:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # biases and LayerNorm
    ]
    return AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)


def build_schedule(optimizer: Optimizer, settings: Optimization, total_steps: int) -> LambdaLR:
    warmup_steps = round(settings.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)
