"""Which of Lightning's flags are refused, as they could not have the effect that its users expect."""

import re
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
)

REFUSED = {  # trainer settings whose work is done elsewhere: (their neutral value, where)
    "accumulate_grad_batches": (1, "a step is cut by data.micro_batches_per_step"),
    "gradient_clip_val": (None, "gradients are clipped by model.optimizer.gradient_clip"),
    "gradient_clip_algorithm": (None, "gradients are clipped by norm, see model.optimizer.gradient_clip"),
    "use_distributed_sampler": (False, "the batches are shared out over the devices already"),
    "default_root_dir": (None, "everything goes to the run's folder: --runs_dir and --name"),
    "barebones": (False, "a run keeps its metrics and checkpoints"),
}


NOT_SUPPORTED: dict[type[Callback], str] = {  # callbacks that are not for us
    GradientAccumulationScheduler: "a step is cut by data.micro_batches_per_step",
    BatchSizeFinder: "data.tokens_per_pass is what memory limits, and `condenser estimate` says what fits",
    LearningRateFinder: "it would take steps of another schedule than the run's",
    BaseFinetuning: "model.freeze_layers and model.optimizer.head_only_steps freeze what is to stay as it is",
    ModelPruning: "weights are trained as they are",
}
DEVICES = ("auto", "cpu", "gpu", "cuda")


def check_trainer(settings: Any) -> None:
    """Raises ValueError for what could not have the effect that a user of Lightning expects."""
    for key, (neutral, why) in REFUSED.items():
        if settings[key] != neutral:
            raise ValueError(f"trainer.{key} cannot be used here: {why}")
    if settings.logger is False:
        raise ValueError("trainer.logger=false: metrics.csv is what a run is read from; --wandb off leaves W&B out")
    check_precision(settings.precision)
    strategy = settings.strategy if isinstance(settings.strategy, str) else settings.strategy.get("class_path", "")
    if re.search("(?i)fsdp|deepspeed", strategy):
        raise ValueError(f"trainer.strategy={strategy} is not supported: -c configs/hardware/fsdp.yaml shards weights")
    for key in ("val_check_interval", "check_val_every_n_epoch"):
        value = settings[key]
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(
                f"trainer.{key}={value} must be positive; trainer.limit_val_batches=0 leaves validation out"
            )
    if (settings.log_every_n_steps or 0) < 0:
        raise ValueError(f"trainer.log_every_n_steps={settings.log_every_n_steps} must be at least 1; 0 logs nothing")
    if settings.accelerator not in DEVICES:
        raise ValueError(f"trainer.accelerator={settings.accelerator}: use one of {', '.join(DEVICES)}")
    if settings.accelerator == "auto" and torch.backends.mps.is_available():  # which has no fp64 for what is counted
        settings.accelerator = "cpu"


def check_callbacks(callbacks: list[Any]) -> None:
    for callback in callbacks:
        for kind, why in NOT_SUPPORTED.items():
            if isinstance(callback, kind):
                raise ValueError(f"{type(callback).__name__} cannot be used here: {why}")


def check_precision(precision: Any) -> None:
    """Raises ValueError for numbers with which training would not be what it is taken for: in fp16 losses would have to
    be scaled, and of weights in bf16 a third would never change."""
    if str(precision or "32-true") not in ("32", "32-true", "bf16", "bf16-mixed", "64", "64-true"):
        raise ValueError(f"trainer.precision={precision} is not supported; use bf16-mixed, or 32-true")
