"""An optimizer step of the real model and optimizer on tensors without memory, to count the bytes that it would hold.

Fake tensors have a shape, a dtype and a lifetime: what is alive when is therefore known without computing anything. The
estimate of a run's memory (`condenser estimate`) is made of this. Memory inside kernels is not seen.
"""

import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForMaskedLM, PreTrainedModel

from condenser.data.collate import Layout, make_micro_batch
from condenser.data.datamodule import CondenserDataModule
from condenser.data.synthetic import VOCABULARY, SyntheticStore
from condenser.models.attention import run_layer
from condenser.models.backbones.base import build_masked_lm, changed_config, prepare_layers
from condenser.models.condenser import Condenser
from condenser.training.module import CondenserModule
from condenser.training.optim import build_optimizer

KINDS = ("weights", "gradients", "optimizer", "bf16 copies", "logits", "activations")


class Setting(NamedTuple):
    """What memory depends on, beside the model and the micro-batch."""

    precision: str  # 32-true or bf16-mixed
    checkpointing: bool
    fused: bool  # loss
    on_gpu: bool


class Rehearsal:
    """Steps of a run on fake tensors. The module is given its model, whose weights are not loaded."""

    def __init__(self, module: CondenserModule, datamodule: CondenserDataModule):
        self.module, self.datamodule, self.fake = module, datamodule, FakeTensorMode()
        has_store = all(folder.is_dir() for folder in datamodule.weights)
        defaults = {"vocab_size": len(datamodule.tokenizer)} if has_store else {}
        head: dict[str, Any] = module.head
        with self.fake:
            lm = skeleton(module.backbone, module.backbone_config, **defaults)
            module.model = self.model = Condenser.from_masked_lm(lm, **head).train()
            prepare_layers(lm, **module.layers)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if datamodule.layout == "packed" or not lm.config.attention_probs_dropout_prob:
            self.model.pack()

    def peak(self, setting: Setting, lengths: np.ndarray, accumulates: bool = True) -> tuple[Counter[str], int]:
        """Bytes alive, by kind, at the worst moment of a step whose last micro-batch has rows of these ``lengths``; and
        those that the first layer keeps for the backward pass.

        Args:
            accumulates: the device has had other micro-batches in this step, whose gradients are there.
        """
        model, module, live = self.model, self.module, LiveBytes(self.model.lm.config.vocab_size)
        batch = micro_batch(lengths, self.datamodule, "packed" if self.packs(setting) else "padded")
        model.gradient_checkpointing, model.fused_loss = setting.checkpointing, setting.fused
        device = AsOnGPU if setting.on_gpu else nullcontext
        kept: list[int] = []

        def layer(*args: Any) -> Tensor:  # called again, outside the other `device()`, where a layer is recomputed
            before = live.live["activations"]
            with device():
                output = run_layer(*args)
            kept.append(live.live["activations"] - before)
            return output

        model.run_layer = layer
        autocast = torch.autocast("cpu", torch.bfloat16, setting.precision == "bf16-mixed", cache_enabled=False)
        with self.fake, live:
            optimizer, hooks = self.prepare(live, accumulates)
            inputs = {k: self.fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
            with autocast:
                with device():
                    output = module.model_output(inputs, score=False)
                    loss = module.step_loss(output)
                loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
        return live.at_peak, kept[0]

    def packs(self, setting: Setting) -> bool:
        """As `CondenserModule.choose_layout` has it."""
        if not setting.on_gpu:
            return self.datamodule.layout == "packed"
        dropout = self.model.lm.config.attention_probs_dropout_prob
        return self.datamodule.layout != "padded" and "bf16" in setting.precision and not dropout

    def prepare(self, live: "LiveBytes", accumulates: bool) -> tuple[torch.optim.Optimizer, list[Any]]:
        """The optimizer after a first step, so that its states are there; and hooks that tell gradients as such."""
        module, start = self.module, {}
        for tensor in [*module.parameters(), *module.buffers()]:
            live.count(tensor, "weights")
        live.new = "optimizer"
        if module.optimization.decay_to_start:
            start = {name: p.detach().clone() for name, p in self.trained.items() if not name.startswith("c_head.")}
        optimizer = build_optimizer(module, module.optimization, start)
        live.new = "gradients"
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        live.new = "optimizer"
        try:
            optimizer.step()
        except DataDependentOutputException:
            raise ValueError(
                f"{module.optimization.optimizer} reads values, so its memory cannot be counted without any; "
                "estimate with --model.optimizer.optimizer torch.optim.AdamW, which needs 8 bytes a weight"
            ) from None
        if not accumulates:
            optimizer.zero_grad()
        live.new, live.at_peak = "activations", live.live.copy()

        def tell(parameter: Tensor) -> None:
            assert parameter.grad is not None
            live.count(parameter.grad, "gradients")

        return optimizer, [p.register_post_accumulate_grad_hook(tell) for p in self.trained.values()]


def skeleton(backbone: str | None, settings: dict[str, Any], **defaults: Any) -> PreTrainedModel:
    """As `build_masked_lm`, but weights are not loaded."""
    if backbone is None:
        return build_masked_lm(None, settings, **defaults)
    try:
        config = changed_config(backbone, settings)
    except OSError as error:
        raise ValueError(
            f"model.backbone: no configuration of {backbone!r} is at hand ({str(error).splitlines()[0]}); "
            "give a folder, or --model.backbone null for a BERT of base size that model.backbone_config changes"
        ) from None
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def micro_batch(lengths: np.ndarray, datamodule: CondenserDataModule, layout: Layout = "padded") -> dict[str, Any]:
    """One of rows of these ``lengths``, masked as the run will mask them; which tokens they hold does not matter."""
    rows, ids = SyntheticStore(1), np.arange(len(lengths))
    rows.lengths = lengths
    masking, multiple_of = datamodule.masking, datamodule.pad_to_multiple_of
    return make_micro_batch(rows.rows(ids), ids, 0, VOCABULARY, masking, layout, multiple_of)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, by kind, and keeps the counts of the moment when they were most."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.new = vocabulary, "activations"  # what new tensors are
        self.known: dict[int, tuple[str, int, Any]] = {}
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and self.kind(args[0]) == "weights"
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and self.kind(tensor) is None:
                is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
                self.count(tensor, "bf16 copies" if is_copy else "logits" if is_logits else self.new)
        if self.live.total() > self.at_peak.total():
            self.at_peak = self.live.copy()
        return output

    def kind(self, tensor: Tensor) -> str | None:
        return self.known.get(tensor.untyped_storage()._cdata, (None,))[0]

    def count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, n_bytes = storage._cdata, storage.nbytes()
        self.forget(key)
        self.known[key] = kind, n_bytes, weakref.ref(storage, lambda _: self.forget(key))
        self.live[kind] += n_bytes

    def forget(self, key: int) -> None:
        if key in self.known:
            kind, n_bytes, _ = self.known.pop(key)
            self.live[kind] -= n_bytes


class AsOnGPU(TorchFunctionMode):
    """Makes fake CPU tensors go a GPU's way: packed attention by its kernel, dropout that keeps a byte a value, no
    attention probabilities that are kept, and LayerNorm in fp32 under autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is F.dropout:
            return dropout_on_gpu(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


def dropout_on_gpu(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0]
