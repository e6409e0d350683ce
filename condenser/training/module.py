"""Condenser pre-training as a LightningModule.

One Lightning batch is one optimizer step of one rank: a list of micro-batches. Optimisation is manual: gradients of all
but the last micro-batch stay on the device, then clip, step, schedule. Each loss is a *sum* over masked tokens divided
by the step's masked tokens on *all* devices, so how many devices share a step does not change it.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from condenser import hub
from condenser.cluster import signals
from condenser.data.hashing import hash_ints
from condenser.models.backbones.base import prepare_layers
from condenser.models.condenser import MODEL_INPUTS, Condenser, CondenserOutput
from condenser.models.flops import Work, training_flops
from condenser.training import sharding
from condenser.training.guard import Guard
from condenser.training.optim import Optimization, build_optimizer, build_schedule, in_model_order, skips_on_device


class CondenserModule(L.LightningModule):
    """Trains a Condenser with the sum of the backbone's MLM loss and the head's.

    Args:
        backbone: Hugging Face masked LM to start from (folder or hub name); an exported Condenser brings its head
            along. Without one, a BERT with random weights and the store's vocabulary.
        backbone_config: settings of the backbone's Hugging Face configuration that differ from its own.
        skip_from: layer whose output the head reads for all tokens but [CLS] (1 .. layers - 1).
        n_head_layers: transformer layers of the head; 0 is plain MLM.
        late_mlm: add the backbone's own MLM loss.
        pruned: run the last layers only where the loss reads them; same loss, less work.
        gradient_checkpointing: recompute every layer in the backward pass: less memory, about a third more work.
        compile: let torch.compile fuse the layers' small operations; a minute or two at the start.
        fused_loss: never hold the logits of all masked tokens: less memory; by default on GPUs where torch can.
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
        skip_from: int = 6,
        n_head_layers: int = 2,
        late_mlm: bool = True,
        pruned: bool = True,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        fused_loss: bool | None = None,
        freeze_embeddings: bool = False,
        freeze_layers: int = 0,
        reinit_layers: int = 0,
        optimizer: Optimization = Optimization(),  # noqa: B008, never changed
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.backbone_config = backbone, backbone_config or {}
        self.head = {"skip_from": skip_from, "n_head_layers": n_head_layers, "late_mlm": late_mlm, "pruned": pruned}
        self.gradient_checkpointing, self.compiled, self.fused_loss = gradient_checkpointing, compile, fused_loss
        self.optimization, self.seed = optimizer, seed
        self.layers: dict[str, Any] = {
            "freeze_embeddings": freeze_embeddings,
            "freeze_layers": freeze_layers,
            "reinit_layers": reinit_layers,
        }
        self.model: Condenser | None = None
        self.start: dict[str, Tensor] = {}  # weights before the first step, where the decay is toward them
        self.tokens_seen = torch.zeros((), dtype=torch.int64)
        self.flops_needed = torch.zeros((), dtype=torch.float64)  # since the start of this process
        streams = [name for name, on in (("mlm", late_mlm), ("head_mlm", n_head_layers > 0)) if on]
        names = [f"{stream}_{what}" for stream in streams for what in ("loss", "accuracy", "loss_at_mask")]
        self.val_metrics: Any = nn.ModuleDict({name: MeanMetric() for name in ["loss", *names, "unigram_loss_at_mask"]})

    def configure_model(self) -> None:
        """Build the model once the store, and with it the vocabulary, is known."""
        if self.model is not None:
            return
        torch.manual_seed(self.seed)
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        self.model = hub.warm_start(self.backbone, self.backbone_config, tokenizer, **self.head)
        prepare_layers(self.model.lm, **self.layers)
        self.model.train()  # weights that were loaded come in evaluation mode
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            sharding.shard(self.model, self.trainer.strategy)
        if self.optimization.decay_to_start:
            backbone = ((name, p) for name, p in self.model.named_parameters() if not name.startswith("c_head."))
            self.start = {name: p.detach().clone() for name, p in backbone if p.requires_grad}
        self.model.gradient_checkpointing, self.model.fused_loss = self.gradient_checkpointing, self.fused_loss
        self.choose_layout()
        if self.compiled:
            self.model.compile()

    def choose_layout(self) -> None:
        """Settle how micro-batches are laid out, if the data leave it open, and prepare the model for it."""
        assert self.model is not None
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        on_gpu, bf16 = self.trainer.strategy.root_device.type == "cuda", "bf16" in str(self.trainer.precision)
        if datamodule.layout == "auto":
            suits = on_gpu and bf16 and not self.model.lm.config.attention_probs_dropout_prob
            datamodule.layout = "packed" if suits else "padded"
        if datamodule.layout == "packed":
            if on_gpu and not bf16:
                raise ValueError("data.layout=packed needs trainer.precision=bf16-mixed on a GPU")
            self.model.pack()

    def setup(self, stage: str) -> None:
        if "16" in str(self.trainer.precision) and "bf16" not in str(self.trainer.precision):
            raise ValueError(
                f"trainer.precision={self.trainer.precision} needs loss scaling; use bf16-mixed, or 32-true"
            )

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, self.optimization, self.start)
        steps = self.total_steps()
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(optimizer, self.optimization, steps)}

    def total_steps(self) -> int:
        """Of the whole run. (Lightning's own estimate sets up the loader before it is told where a run goes on.)"""
        trainer: Any = self.trainer
        n_steps, n_epochs = trainer.max_steps, trainer.max_epochs
        if n_epochs is None or n_epochs < 0:
            if n_steps < 0:
                raise ValueError("the schedule needs to know when the run ends: set trainer.max_epochs or max_steps")
            return n_steps
        by_epochs = n_epochs * trainer.datamodule.train_dataloader().dataset.batches.steps_per_epoch
        return by_epochs if n_steps < 0 else min(n_steps, by_epochs)

    def on_fit_start(self) -> None:
        if self.device.type == "cuda" and self.trainer.precision != "32-true":
            torch.set_float32_matmul_precision("high")
        self.guard = Guard(Path(self.trainer.default_root_dir), self.trainer.global_rank)

    def training_step(self, micro_batches: list[dict[str, Any]], batch_idx: int) -> None:
        """One optimizer step. It never waits for a GPU, but for what is logged on logging steps."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        n_masked, n_tokens, area, n_sequences, flops, *asked = self.sizes(micro_batches)
        weight = self.trainer.world_size / n_masked  # DDP averages gradients over devices
        log = self.is_logging_step(self.global_step + 1)
        losses, sums = [], []
        for number, batch in enumerate(micro_batches, start=1):
            torch.manual_seed(dropout_seed(self.seed, batch["step"], batch["micro_batch"]))
            with nullcontext() if number == len(micro_batches) else self.unsynchronised():
                output = self.model_output(batch, score=log)
                loss = self.step_loss(output)
                self.manual_backward(loss * weight)
            losses.append(loss.detach())
            sums.append(stream_sums(output) if log else {})
        clip = self.optimization.gradient_clip or float("inf")
        norm = sharding.whole(nn.utils.clip_grad_norm_(self.parameters(), clip, foreach=True))
        not_finite = self.guard.watch(self.global_step + 1, micro_batches, losses, norm, torch.stack(asked))
        if skips_on_device(optimizer.optimizer):
            optimizer.optimizer.found_inf = not_finite
        else:
            self.guard.check()
        self.trainer.should_stop = self.trainer.should_stop or self.guard.stop
        optimizer.step()
        optimizer.zero_grad()
        self.tokens_seen = self.tokens_seen.to(n_tokens.device) + n_tokens.long()
        self.flops_needed = self.flops_needed.to(flops.device) + flops
        if log:
            extra = {"grad_norm": norm, "lr": scheduler.get_last_lr()[0], "sequences": n_sequences}
            self.log_step(sums, n_masked, extra, padding=1 - n_tokens / area)
        scheduler.step()

    def step_loss(self, output: CondenserOutput) -> Tensor:
        """What is minimised: a sum over a micro-batch's masked tokens. Override it for another objective."""
        return output.loss_sum

    def model_output(self, batch: dict[str, Any], score: bool) -> CondenserOutput:
        assert self.model is not None
        return self.model(**{name: value for name, value in batch.items() if name in MODEL_INPUTS}, score=score)

    def sizes(self, micro_batches: list[dict[str, Any]]) -> Tensor:
        """Of this step on all devices: masked tokens, tokens, positions computed, sequences, needed operations; and how
        many devices were asked to stop, to be started again."""
        assert self.model is not None
        config, n_head_layers = self.model.lm.config, len(self.model.c_head)
        of_each = [
            (b["n_masked"], b["n_tokens"], b["area"], len(b["sample_ids"]), Work.needed(b)) for b in micro_batches
        ]
        rows = [(*row, training_flops(config, n_head_layers, self.model.late_mlm, work)) for *row, work in of_each]
        totals = [sum(column) for column in zip(*rows, strict=True)]
        asked = [number in signals.received for number in (signals.STOP, signals.REQUEUE)]
        return self.summed(torch.tensor([*totals, *asked], dtype=torch.float32))

    def summed(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all devices. (Lightning's own reduction has a barrier, which waits.)"""
        values = values.to(self.device, non_blocking=True)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        return values

    def is_logging_step(self, step: int) -> bool:
        trainer: Any = self.trainer
        return step % trainer.log_every_n_steps == 0

    def unsynchronised(self) -> AbstractContextManager:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            return sharding.unsynchronised(self.model)  # type: ignore[arg-type]
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def log_step(self, sums: list[dict[str, Tensor]], n_masked: Tensor, extra: dict[str, Any], padding: Tensor) -> None:
        names = list(sums[0])
        local = torch.stack([torch.stack([step_sums[name] for step_sums in sums]).sum() for name in names])
        means = self.summed(local) / n_masked
        values = dict(zip(names, means, strict=True))
        values["loss"] = torch.stack([value for name, value in values.items() if name.endswith("loss")]).sum()
        values |= {**extra, "tokens_seen": self.tokens_seen.double()}
        self.log_dict({f"train/{name}": value for name, value in values.items() if name != "loss"})
        self.log("train/loss", values["loss"], prog_bar=True)
        self.log("perf/padding_fraction", padding)

    def validation_step(self, micro_batches: list[dict[str, Any]], batch_idx: int) -> None:
        nats = self.trainer.datamodule.unigram_nats.to(self.device)  # type: ignore[attr-defined]
        mask_id = self.trainer.datamodule.tokenizer.mask_token_id  # type: ignore[attr-defined]
        for batch in micro_batches:
            output = self.model_output(batch, score=True)
            at_mask = batch["input_ids"].flatten()[batch["masked_index"]] == mask_id
            targets = batch["labels"].flatten()[batch["masked_index"]]
            self.val_metrics["loss"].update(torch.stack(output.streams()).sum(0))
            self.val_metrics["unigram_loss_at_mask"].update(nats[targets][at_mask])
            for stream in ("mlm", "head_mlm"):
                losses = getattr(output, f"{stream}_token_losses")
                if losses is not None:
                    self.val_metrics[f"{stream}_loss"].update(losses)
                    self.val_metrics[f"{stream}_loss_at_mask"].update(losses[at_mask])
                    self.val_metrics[f"{stream}_accuracy"].update(getattr(output, f"{stream}_correct").float())
        for name, metric in self.val_metrics.items():
            self.log(f"val/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "loss", batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        self.guard.check()  # the last step's, before its weights are kept
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        config = Path(self.trainer.default_root_dir) / "config.yaml"
        checkpoint["tokens_seen"] = int(self.tokens_seen)
        if "optimizer_states" in checkpoint and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            optimizer: Any = self.trainer.optimizers[0]
            checkpoint["optimizer_states"] = [in_model_order(checkpoint["optimizer_states"][0], optimizer, self)]
        folder = next(iter(datamodule.weights)) / "tokenizer"
        run_config = config.read_text() if config.is_file() else ""
        checkpoint["condenser"] = hub.description(self.model, folder, datamodule.about(), run_config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # the sharded strategy has loaded it already
            self.check_fits(checkpoint)
        self.tokens_seen = torch.tensor(checkpoint["tokens_seen"], dtype=torch.int64)

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


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """What dropout is drawn from in one micro-batch of one step, whichever device computes it."""
    return int(hash_ints(seed, step, micro_batch) >> 1)


def stream_sums(output: CondenserOutput) -> dict[str, Tensor]:
    """Sums over a micro-batch's masked tokens of each stream's losses and right predictions."""
    named = {
        "mlm_loss": output.mlm_token_losses,
        "mlm_accuracy": output.mlm_correct,
        "head_mlm_loss": output.head_mlm_token_losses,
        "head_mlm_accuracy": output.head_mlm_correct,
    }
    return {name: values.detach().float().sum() for name, values in named.items() if values is not None}
