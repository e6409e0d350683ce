"""Weights, gradients and optimizer states shared out over all devices (FSDP2), for backbones too large for one GPU.

A layer is put together on every device only while it is computed, so what stands in memory at once is a share of the
model and one layer. A step is the one that DDP takes, and so is the checkpoint: one file with whole weights, which any
number of devices goes on from, sharded or not. To use it: `-c configs/hardware/fsdp.yaml`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from condenser.models.files import load_file
from condenser.models.objective import Objective


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy over all devices there are, whose number it would otherwise have to be told."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        # read in setup_environment, and known no earlier; its public name is an argument of the constructor alone
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module: Any = self.lightning_module
        module.check_fits(load_file(checkpoint_path, mmap=True))
        return super().load_checkpoint(checkpoint_path, weights_only=True)


def shard(model: Objective, strategy: ModelParallelStrategy) -> None:
    """Share out each layer, and what is left (embeddings, MLM head and the tied decoder) as one.

    Raises:
        ValueError: devices that would not share the data, or checkpoints that only as many devices can read.
    """
    mesh = strategy.device_mesh
    if (size := mesh["tensor_parallel"].size()) != 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size={size} would leave devices without data of their own; set it to 1 "
            f"and data_parallel_size to the number of devices, {mesh.size()}"
        )
    if strategy._save_distributed_checkpoint:  # the argument has no public name
        raise ValueError("trainer.strategy: set save_distributed_checkpoint to false; a checkpoint is one file here")
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # it would matter if they were written to in place
    for layer in dict.fromkeys([*model.backbone.layers, *getattr(model, "c_head", ())]):
        fully_shard(layer, mesh=mesh["data_parallel"])
        layer.run = partial(model.backbone.run, layer)
        register_fsdp_forward_method(layer, "run")  # only methods that are known gather weights
    fully_shard(model, mesh=mesh["data_parallel"])
    for method in ("losses", "cls_states", "cls_and_losses"):
        register_fsdp_forward_method(model, method)


@contextmanager
def no_sync(model: FSDPModule) -> Iterator[None]:
    """Keep gradients on the device, whole, until a backward pass outside of this."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)
