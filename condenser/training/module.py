"""Condenser pre-training as a LightningModule.

One Lightning batch is one optimizer step of one rank: its passes. Optimisation is manual: `TrainingStep` takes the
step; here is what it is told (counts over all devices, settings of the device), and what is logged of it.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher  # there is no other sign of spawn and fork
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from condenser import hub
from condenser.cluster import signals
from condenser.data.collate import StepBatch
from condenser.data.store import check_same_stores
from condenser.models.backbones.base import NAMED, Backbone, prepare_layers
from condenser.models.condenser import Condenser
from condenser.models.flops import Work
from condenser.models.objective import COUNTS, Objective, is_ours, known_options
from condenser.models.positions import Extension
from condenser.runs import CONFIG
from condenser.training import sharding
from condenser.training.device import check_rows, compiled_and_replayed, keep_few_kernels, tokens_that_fit
from condenser.training.ending import averaging, go_on, length_of, stopped_by, validation_follows
from condenser.training.flags import check_precision
from condenser.training.guard import Guard, on_all_devices
from condenser.training.optim import Optimization, build_optimizer, build_schedule, in_model_order
from condenser.training.passes import check_dummies
from condenser.training.step import StepResult, TrainingStep, skips_on_device
from condenser.training.validation import Validation

TOTALS = (*COUNTS, "flops", "positions")  # of a step, over all devices: operations needed, positions computed


class CondenserModule(L.LightningModule):
    """Trains an objective: a Condenser by default, with the sum of the backbone's MLM loss and the head's.

    Args:
        backbone: Hugging Face masked LM to start from (folder or hub name); an exported Condenser brings its head
            along. Without one, a BERT with random weights and the store's vocabulary.
        backbone_config: settings of the backbone's Hugging Face configuration that differ from its own.
        backbone_family: class that takes the backbone apart, by its path, where it is one of your own: of a model type
            that there is none for (docs/backbones.md).
        max_positions: tokens of a text, special ones included, that the backbone is to take, if more than it does.
        position_extension: how positions that are embedded are made more: hierarchical (the first stay as they are),
            interpolated, or copied.
        truncated_normal: draw random weights with nothing beyond two standard deviations; the deviation is
            initializer_range of backbone_config, 0.02 by default.
        vocabulary_multiple: fill the vocabulary up to a multiple of so many rows, which an export leaves out.
        objective: class of what is minimised, by its path: condenser.models.condenser.Condenser,
            condenser.models.cocondenser.CoCondenser, condenser.models.retromae.RetroMAE, or one of your own.
        objective_options: its further settings, by name.
        skip_from: layer whose output the head reads for all tokens but [CLS] (1 .. layers - 1).
        n_head_layers: transformer layers of the head; 0 is plain MLM.
        late_mlm: add the backbone's own MLM loss.
        pruned: run the last layers only where the loss reads them; same loss, less work.
        gradient_cache: for a contrast over the whole step, compute [CLS] vectors twice rather than keep all passes in
            memory; by default where a device has several passes.
        gradient_checkpointing: recompute every layer in the backward pass: less memory, about a third more work.
        compile: let torch.compile make one function of a pass, from ids to loss, which takes a minute or more for each
            of a few shapes; by default on GPUs, where weights are not sharded.
        cuda_graphs: replay compiled passes as CUDA graphs, at one launch each; by default on one GPU.
        fused_loss: never hold the logits of all masked tokens: less memory, but slower.
        freeze_embeddings: keep the embeddings as they are; the MLM head's decoder is tied to them.
        freeze_layers: keep the first layers of the backbone as they are.
        reinit_layers: draw the last layers of the backbone anew.
        optimizer: learning rate, schedule, clipping.
        seed: seed of initialisation and dropout; follows seed_everything.
    """

    def __init__(
        self,
        backbone: str | None = None,
        backbone_config: dict[str, Any] | None = None,
        backbone_family: type[Backbone] | None = None,
        max_positions: int | None = None,
        position_extension: Extension = "hierarchical",
        truncated_normal: bool = False,
        vocabulary_multiple: int = 1,
        objective: type[Objective] = Condenser,
        objective_options: dict[str, Any] | None = None,
        skip_from: int = 6,
        n_head_layers: int = 2,
        late_mlm: bool = True,
        pruned: bool = True,
        gradient_cache: bool | None = None,
        gradient_checkpointing: bool = False,
        compile: bool | None = None,
        cuda_graphs: bool | None = None,
        fused_loss: bool = False,
        freeze_embeddings: bool = False,
        freeze_layers: int = 0,
        reinit_layers: int = 0,
        optimizer: Optimization = Optimization(),  # noqa: B008, never changed
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.backbone_family, NAMED[:] = backbone_family, [backbone_family] if backbone_family else []
        self.backbone, self.backbone_config, self.objective = backbone, backbone_config or {}, objective
        self.beginning: Any = {
            "max_positions": max_positions,
            "position_extension": position_extension,
            "truncated_normal": truncated_normal,
            "vocabulary_multiple": vocabulary_multiple,
        }
        self.head = {"skip_from": skip_from, "n_head_layers": n_head_layers, "late_mlm": late_mlm, "pruned": pruned}
        self.objective_options = objective_options or {}
        self.gradient_cache = gradient_cache
        self.gradient_checkpointing, self.fused_loss = gradient_checkpointing, fused_loss
        self.wanted = {"compile": compile, "cuda_graphs": cuda_graphs}
        self.compiled = self.replayed = False  # what comes of them on a device
        self.optimization, self.seed = optimizer, seed
        self.layers: dict[str, Any] = {
            "freeze_embeddings": freeze_embeddings,
            "freeze_layers": freeze_layers,
            "reinit_layers": reinit_layers,
        }
        self.model: Objective | None = None
        self.is_prepared = False  # for training, by the settings above
        self.guard: Any = None  # of the steps, in training
        self.start: dict[str, Tensor] = {}  # weights before the first step, where the decay is toward them
        self.length, self.validation_owed = 0, False  # see ending.py
        self.stopped: str | None = None
        self.tokens_seen, self.flops_needed = 0, 0.0  # up to the last logging step or checkpoint
        self.since = torch.zeros(len(TOTALS), dtype=torch.float64)  # what was done since then

    @property
    def options(self) -> dict[str, Any]:
        """What the objective is made with. Raises ValueError for an option that it does not take."""
        return known_options(self.objective, self.head, self.objective_options)

    @property
    def datamodule(self) -> Any:
        trainer: Any = self.trainer
        return trainer.datamodule

    def configure_model(self) -> None:
        """Build the model once the store, and with it the vocabulary, is known; or prepare that of a checkpoint."""
        try:
            trainer = self.trainer
        except RuntimeError:  # there is none: `load_from_checkpoint` is at work
            return
        layers = self.layers
        if self.model is None:
            self.model = self.built(print if trainer.is_global_zero else lambda message: None)
        else:
            layers = layers | {"reinit_layers": 0}  # those of the checkpoint are trained
        if not self.is_prepared:
            self.prepare(self.model, layers)
        self.settle()
        if trainer.state.fn == TrainerFn.FITTING:
            self.length = length_of(trainer)

    def built(self, say: Callable[[str], None]) -> Objective:
        options = self.options
        usual = inspect.signature(CondenserModule).parameters
        given = [name for name, value in self.head.items() if value != usual[name].default]
        if unused := [name for name in given if name not in options]:
            say(f"a {self.objective.__name__} has no use for model.{', '.join(unused)}")
        torch.manual_seed(self.seed)
        settings, tokenizer, options = self.backbone_config, self.datamodule.tokenizer, self.beginning | options
        model = hub.warm_start(self.backbone, settings, tokenizer, self.objective, say, **options)
        _ = model.settings, model.flops(Work(2, 4, 2, 4, 1))  # an objective hears now, not later, what it lacks
        return model

    def prepare(self, model: Objective, layers: dict[str, Any]) -> None:
        """Once, for training."""
        self.trainer.precision_plugin.convert_module(model)  # Lightning's comes after a checkpoint's weights
        prepare_layers(model.lm, **layers)
        model.train()  # weights that were loaded come in evaluation mode
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            sharding.shard(model, self.trainer.strategy)
        if self.optimization.decay_to_start:
            backbone = ((name, p) for name, p in model.named_parameters() if name.startswith("lm."))
            self.start = {name: p.detach().clone() for name, p in backbone if p.requires_grad}
        model.gradient_checkpointing, model.fused_loss = self.gradient_checkpointing, self.fused_loss
        self.is_prepared = True

    def settle(self) -> None:
        """Decide what is left open and depends on the device: how passes are computed, and how large they are.

        Raises:
            ValueError: a setting that this device, or the sharing of it, does not allow.
        """
        assert self.model is not None
        datamodule, device = self.datamodule, self.trainer.strategy.root_device
        self.compiled, self.replayed = compiled_and_replayed(
            self.trainer, **self.wanted, recomputed=self.gradient_checkpointing
        )
        datamodule.few_shapes = self.compiled
        datamodule.few_sizes = device.type == "cpu" and self.trainer.precision == "bf16-mixed"
        datamodule.provide_for(self.model)
        check_rows(self.model, getattr(datamodule, "longest", 0))
        if device.type == "cuda":
            datamodule.affordable = tokens_that_fit(self.model, device, datamodule.masking.probability)
        else:
            keep_few_kernels()

    def setup(self, stage: str) -> None:
        self.stopped, self.validation_owed = None, False  # of another trainer's
        self.tokens_seen, self.flops_needed, self.since = 0, 0.0, torch.zeros_like(self.since)
        check_precision(self.trainer.precision)
        if not hasattr(self.datamodule, "provide_for"):
            raise ValueError(
                "Trainer.fit(module, datamodule=CondenserDataModule(...)): order, masks and passes come from the data "
                "module, loaders alone cannot take its place"
            )
        device = self.trainer.strategy.root_device.type
        if device not in ("cpu", "cuda"):
            raise ValueError(f"trainer.accelerator: {device} is not supported; use cpu, or a CUDA GPU")
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher) and self.trainer.is_global_zero:
            print(
                "spawned and forked processes keep the model that they train: save a checkpoint, and read it with "
                "CondenserModule.load_from_checkpoint"
            )
        for callback in averaging(self.trainer):  # it copies the module here, and the model is still to be made
            self.configure_model()
            callback.setup(self.trainer, self, stage)

    def configure_optimizers(self) -> Any:
        self.optimization.try_out(self.device)
        optimizer = build_optimizer(self, self.optimization, self.start)
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(optimizer, self.optimization, self.length)}

    def on_fit_start(self) -> None:
        if self.device.type == "cuda" and self.trainer.precision != "32-true":
            torch.set_float32_matmul_precision("high")
        assert self.model is not None
        if self.device.type == "cuda" and self.trainer.is_global_zero and not self.model.backbone.has_kernel:
            print(f"{self.model.lm.config.model_type}: attention lays sequences out in rows, which takes longer")
        self.guard = Guard(Path(self.trainer.default_root_dir), self.trainer.global_rank, self.all_reduce)

    def on_train_start(self) -> None:
        if self.lr_schedulers() is None:  # within an epoch Lightning does not tell averaging to go on
            groups = self.trainer.optimizers[0].param_groups
            rates = [group["lr"] for group in groups]
            for callback in averaging(self.trainer):
                callback.on_train_epoch_start(self.trainer, self)
            for group, rate in zip(groups, rates, strict=True):  # which a new schedule has changed
                group["lr"] = rate
        if isinstance(self.lr_schedulers(), LambdaLR):
            self.set_rates()
        assert self.model is not None
        trainer: Any = self.trainer
        steps = trainer.train_dataloader.dataset
        if (steps.shapes or steps.few_sizes) and not is_ours(self.model):
            check_dummies(self.model, steps, self.device)
        self.step = TrainingStep(
            self.model,
            self.trainer.optimizers[0],
            clip=self.optimization.gradient_clip,
            seed=self.seed,
            compiled=self.compiled,
            replayed=self.replayed,
            backward=self.manual_backward,
            no_sync=self.no_sync,
            all_reduce=self.all_reduce,
            gradient_cache=self.gradient_cache,
        )
        self.end_here()

    def set_rates(self) -> None:
        """Those of this run's length; the ones in a checkpoint are of its own."""
        schedule: Any = self.lr_schedulers()
        groups: Any = schedule.optimizer.param_groups
        before = max(group["lr"] for group in groups)
        for group, peak, share_at in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak * share_at(schedule.last_epoch)
        if (now := max(group["lr"] for group in groups)) != before and self.trainer.is_global_zero:
            print(
                f"the learning rate is {now:.3g} here, not {before:.3g}: the schedule is that of {self.length:,} steps"
            )

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step. It never waits for a GPU, but for what is logged on logging steps, once."""
        optimizer: Any = self.optimizers()
        totals, requests = self.all_reduce(self.figures(batch)).split([len(TOTALS), 2])
        log = self.is_logging_step(self.global_step + 1)
        scale = self.trainer.world_size / totals[: len(COUNTS)].clamp(min=1)  # DDP averages gradients over devices

        def watch(losses: Tensor, norm: Tensor) -> Tensor:
            not_finite = self.guard.watch(self.global_step + 1, batch, losses, norm, requests)
            if not skips_on_device(optimizer.optimizer):
                self.guard.check()
            self.trainer.should_stop = self.trainer.should_stop or self.guard.stop
            return not_finite

        passes, norm = self.step.take(batch, scale.float(), log, watch, optimizer.step)
        self.since = self.since.to(self.device) + totals
        scheduler: Any = self.lr_schedulers()
        if log:
            self.log_step(passes, totals, norm)
        ends_epoch = self.global_step % self.trainer.num_training_batches == 0
        if isinstance(scheduler, LambdaLR) or ends_epoch:  # that of a callback, as of averaging, is one of epochs
            scheduler.step()

    def figures(self, batch: StepBatch) -> Tensor:
        """Of this device: `TOTALS` of its passes; whether it was asked to stop, and to be started again."""
        assert self.model is not None
        counts, flops = [batch.total(name) for name in COUNTS], self.model.flops(Work.of_real_tokens(batch))
        requests = bool(signals.received & {signals.STOP, signals.INTERRUPT}), signals.REQUEUE in signals.received
        return torch.tensor([*counts, flops, batch.n_positions, *requests], dtype=torch.float64)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all devices. (Lightning's own reduction has a barrier, which waits.)"""
        values = values.to(self.device, non_blocking=True)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        return values

    def is_logging_step(self, step: int) -> bool:
        trainer: Any = self.trainer
        every: int = trainer.log_every_n_steps  # 0: never
        return every > 0 and step % every == 0

    def no_sync(self) -> AbstractContextManager:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            return sharding.no_sync(self.model)  # type: ignore[arg-type]
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def log_step(self, passes: StepResult, totals: Tensor, norm: Tensor) -> None:
        shares, nothing = passes.shares | {"loss": passes.losses.sum()}, norm.new_zeros(())
        everywhere = [shares] if is_ours(self.model) else on_all_devices([*shares])  # which may have other terms
        names = dict.fromkeys(name for each in everywhere for name in each)
        sums = torch.stack([shares.get(name, nothing) for name in names]).double()
        means = self.all_reduce(sums) / self.trainer.world_size
        found = torch.cat([self.since, totals, norm.double()[None], means]).tolist()  # here the host waits
        n = len(TOTALS)
        self.count(found[:n])
        of_step = dict(zip(TOTALS, found[n : 2 * n], strict=True))
        norm_value, *values = found[2 * n :]
        logged = dict(zip(names, values, strict=True)) | {"grad_norm": norm_value}
        logged["sequences"] = of_step["n_sequences"]
        logged |= {"lr": max(self.lr_schedulers().get_last_lr()), "tokens_seen": float(self.tokens_seen)}  # type: ignore[union-attr]
        self.log("train/loss", logged.pop("loss"), prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in logged.items()})
        self.log("perf/padding_fraction", 1 - of_step["n_tokens"] / of_step["positions"])

    def count(self, since: list[float]) -> None:
        """Add up what was done since the last time, which the device has kept."""
        done = dict(zip(TOTALS, since, strict=True))
        self.tokens_seen += int(done["n_tokens"])
        self.flops_needed += done["flops"]
        self.since = torch.zeros_like(self.since)

    def on_validation_epoch_start(self) -> None:
        assert self.model is not None
        nats, mask_id = self.datamodule.unigram_nats.to(self.device), self.datamodule.tokenizer.mask_token_id
        self.validation = Validation(self.model, nats, mask_id)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        self.validation.add(batch, self.all_reduce)

    def on_train_batch_end(self, outputs: Any, batch: StepBatch, batch_idx: int) -> None:
        self.end_here()  # after the callbacks

    def end_here(self) -> None:
        """End training where it is to end. Lightning validates where training is to stop: as it should at the end of a
        run, and should not where there may be no time for it."""
        trainer: Any = self.trainer
        if self.global_step >= self.length:
            trainer.should_stop = not self.validation_owed
            trainer.val_check_batch = 1  # where it is owed, it is now
        elif trainer.should_stop and not trainer.validating:
            self.stopped = stopped_by(trainer, self.guard.stop)
            if self.stopped is not None:
                self.validation_owed = validation_follows(trainer, self.global_step)
                trainer.limit_val_batches = 0
                trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def on_validation_model_zero_grad(self) -> None:
        """Lightning would let go of the gradients here, whose buffers stay."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validation_owed = False
            self.end_here()
        found = self.validation.result()
        if "loss" in found:
            self.log("val/loss", found.pop("loss"), prog_bar=True)
        self.log_dict({f"val/{name}": value for name, value in found.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        if self.guard is not None:
            self.guard.check()  # the last step's, before its weights are kept
        datamodule, config = self.datamodule, Path(self.trainer.default_root_dir) / CONFIG
        self.count(self.since.tolist())
        checkpoint["steps_per_epoch"], checkpoint["stores"] = datamodule.steps_per_epoch, datamodule.digests
        checkpoint["length"] = self.length
        in_last_validation = self.trainer.validating and self.global_step >= self.length > 0
        checkpoint["tokens_seen"], checkpoint["owed"] = self.tokens_seen, self.validation_owed or in_last_validation
        if checkpoint.get("optimizer_states") and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            optimizer: Any = self.trainer.optimizers[0]
            checkpoint["optimizer_states"] = [in_model_order(checkpoint["optimizer_states"][0], optimizer, self)]
        run_config = config.read_text(encoding="utf-8") if config.is_file() else ""
        checkpoint["condenser"] = hub.description(
            self.model, datamodule.tokenizer_files, datamodule.about(), run_config
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.model is None:  # `load_from_checkpoint`, without a trainer
            self.model = hub.described(checkpoint["condenser"])
            return
        if "state_dict" in checkpoint:  # the sharded strategy has loaded it already
            self.check_fits(checkpoint)
        self.tokens_seen = checkpoint["tokens_seen"]
        if self.trainer.state.fn == TrainerFn.FITTING:
            if "stores" in checkpoint:
                check_same_stores(checkpoint["stores"], [*self.datamodule.weights], "the checkpoint")
            self.validation_owed = go_on(self.trainer, checkpoint, self.length)

    def check_fits(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError if the checkpoint is of another model, naming the first weight that differs."""
        if "condenser" not in checkpoint:
            raise ValueError("the checkpoint was not written by a Condenser run")
        saved, own = checkpoint["state_dict"], self.state_dict()
        for name in sorted(saved.keys() | own.keys()):
            shapes = [tuple(state[name].shape) if name in state else "absent" for state in (saved, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the checkpoint is of another model: {name} is {shapes[0]} there and {shapes[1]} here"
                )
