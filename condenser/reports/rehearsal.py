"""An optimizer step of the real model and optimizer on tensors without memory, to count the bytes that it would hold.

Fake tensors have a shape, a dtype and a lifetime: what is alive when is therefore known without computing anything, and
torch's own tracker adds it up. The estimate of a run's memory (`condenser estimate`) is made of this. Memory inside
kernels is not seen, nor what a compiler saves.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForMaskedLM

from condenser.data.collate import StepBatch, collate
from condenser.data.datamodule import CondenserDataModule
from condenser.data.synthetic import VOCABULARY, SyntheticStore
from condenser.data.tokenizers import vocabulary_size
from condenser.models import attention
from condenser.models.backbones.base import build_masked_lm, config_of, prepare_layers, with_settings
from condenser.models.initial import fill_vocabulary
from condenser.models.objective import COUNTS, Objective
from condenser.models.positions import with_positions
from condenser.training.device import check_rows
from condenser.training.module import CondenserModule
from condenser.training.optim import build_optimizer
from condenser.training.step import TrainingStep

KINDS = ("weights", "gradients", "optimizer", "forward", "backward")
KIND_OF = {"Parameter": "weights", "Buffer": "weights", "Gradient": "gradients", "Optstate": "optimizer"}
KIND_OF |= {"Activation": "forward", "Temp": "backward", "Other": "optimizer"}  # by the tracker's names


class Setting(NamedTuple):
    """What memory depends on, beside the model and the pass."""

    precision: str  # 32-true or bf16-mixed
    checkpointing: bool
    fused: bool  # loss
    on_gpu: bool


class Rehearsal:
    """Steps of a run on fake tensors. The module is given its model, whose weights are not loaded."""

    def __init__(self, module: CondenserModule, datamodule: CondenserDataModule):
        self.module, self.datamodule, self.fake = module, datamodule, FakeTensorMode()
        has_store = all(folder.is_dir() for folder in datamodule.weights)
        defaults = {"vocab_size": vocabulary_size(datamodule.tokenizer)} if has_store else {}
        with self.fake:
            module.model = self.model = untrained(module, **defaults)
            prepare_layers(self.model.lm, **module.layers)
            if has_store:
                check_rows(self.model, datamodule.longest)
            self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            self.start: dict[str, Tensor] = {}
            if module.optimization.decay_to_start:
                self.start = {name: p.detach().clone() for name, p in self.trained.items() if name.startswith("lm.")}
            self.optimizer = build_optimizer(module, module.optimization, self.start)
        self.gradients = sum(p.nbytes for p in self.trained.values())

    def peak(self, setting: Setting, lengths: np.ndarray) -> dict[str, int]:
        """Bytes alive, by kind, at the worst moment of a step with a pass of rows of these ``lengths`` (without special
        tokens), when the optimizer has its states. More passes need no more."""
        self.model.gradient_checkpointing, self.model.fused_loss = setting.checkpointing, setting.fused
        fields = one_pass(lengths, self.datamodule) | {"step": 0, "micro_batch": 0}
        batch = StepBatch.of([fields], len(lengths))
        tracker = Tracker()
        with self.fake, as_on_gpu() if setting.on_gpu else nullcontext():
            step = TrainingStep(self.model, self.optimizer, clip=1.0)
            batch = StepBatch(self.fake.from_tensor(batch.buffer), batch.layout, batch.n_sequences)
            scale = torch.ones(len(COUNTS))
            step.attach()
            try:
                self.optimizer.step()  # which makes its states
            except DataDependentOutputException:
                raise ValueError(
                    f"{self.module.optimization.optimizer} reads values, so its memory cannot be counted without any; "
                    "estimate with --model.optimizer.optimizer torch.optim.AdamW, which needs 8 bytes a weight"
                ) from None
            tracker.track_external(self.model, self.optimizer, *self.start.values())
            with tracker, torch.autocast("cpu", torch.bfloat16, setting.precision == "bf16-mixed"):
                step.take(batch, scale)
            self.optimizer.zero_grad(set_to_none=True)
        (found,) = tracker.get_tracker_snapshot("peak").values()
        kinds = dict.fromkeys(KINDS, 0)
        for name, kind in KIND_OF.items():
            kinds[kind] += found.get(name, 0)
        return kinds


class Tracker(MemTracker):
    """Torch's own, but without its hooks on weights, which frozen ones refuse; gradients are known before the step."""

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def untrained(module: CondenserModule, **defaults: Any) -> Objective:
    """The model that a run would begin with, but weights are not loaded. Raises ValueError if there is none."""
    if module.backbone is None:
        lm = build_masked_lm(None, module.backbone_config, **defaults)
    else:
        try:
            config = config_of(module.backbone)
        except ValueError as error:
            if Path(module.backbone).exists():
                raise
            raise ValueError(
                f"model.backbone: {error}; give a folder, or --model.backbone null for a BERT of base size that "
                "model.backbone_config changes"
            ) from None
        config = with_settings(getattr(config, "backbone_config", config), module.backbone_config)
        lm = AutoModelForMaskedLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if module.beginning["max_positions"] is not None:
        lm = with_positions(lm, module.beginning["max_positions"])
    fill_vocabulary(lm, module.beginning["vocabulary_multiple"])
    return module.objective.from_masked_lm(lm, **module.options).train()


def one_pass(lengths: np.ndarray, datamodule: CondenserDataModule) -> dict[str, Any]:
    """Of rows of these ``lengths``, masked as the run will mask them; which tokens they hold does not matter."""
    rows, ids = SyntheticStore(1), np.arange(len(lengths))
    rows.lengths = lengths
    return collate(rows.rows(ids), ids, 0, VOCABULARY, datamodule.masking, datamodule.extras) | {"slots": ids}


def as_on_gpu() -> Any:
    """Makes fake CPU tensors go a GPU's way: attention by its kernel."""
    half = (torch.bfloat16, torch.float16)
    return mock.patch.object(attention, "has_kernel", lambda device, dtype: dtype in half)
