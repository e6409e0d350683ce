"""`condenser fit` and `condenser validate`: Lightning's command line, over run folders that resume themselves.

`condenser fit --config C.yaml --name N` writes ``runs/N``. The same command goes on from the newest valid checkpoint
there; a finished run says so; a changed setting is refused by name (devices may change).
"""

import logging
import os
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger

from condenser.data.datamodule import CondenserDataModule
from condenser.training.callbacks import BestCheckpoint, LastCheckpoint, MetricsCSV, Speed, Summary
from condenser.training.module import CondenserModule
from condenser.training.runs import CONFIG, SUMMARY, changed_keys, newest_valid_checkpoint, step_of

REFUSED = {  # trainer settings whose work is done elsewhere: (their neutral value, what to set instead)
    "accumulate_grad_batches": (1, "data.micro_batches_per_step"),
    "gradient_clip_val": (None, "model.optimizer.gradient_clip"),
    "gradient_clip_algorithm": (None, "model.optimizer.gradient_clip (by norm)"),
    "use_distributed_sampler": (False, "nothing: the batches are shared out already"),
}


@dataclass
class Checkpointing:
    """When checkpoints are saved.

    Args:
        every_n_steps: optimizer steps between checkpoints; the newest is kept, and the best by validation loss.
    """

    every_n_steps: int = 1000


class RunCLI(LightningCLI):
    """LightningCLI with a run folder."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, help="name of the run: everything goes to RUNS_DIR/NAME")
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--wandb", type=Literal["online", "offline", "off"], default="off", help="Weights & Biases beside the CSV"
        )
        parser.add_class_arguments(Checkpointing, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        if not settings.name:
            raise ValueError("the run needs a name: --name NAME, or name: in the configuration")
        for key, (neutral, instead) in REFUSED.items():
            if settings.trainer[key] != neutral:
                raise ValueError(f"trainer.{key} cannot be used here; set {instead}")
        self.run = Path(settings.runs_dir) / settings.name
        self.checkpoint = newest_valid_checkpoint(self.run) if settings.ckpt_path is None else Path(settings.ckpt_path)
        if self.subcommand == "fit":
            self.begin_run(settings)
        elif self.checkpoint is None:
            raise ValueError(f"{self.run} has no checkpoint to validate; give one with --ckpt_path")
        settings.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        settings.trainer.default_root_dir = str(self.run)

    def begin_run(self, settings: Any) -> None:
        """Make the run folder, or see that it is this configuration's own."""
        text = self._parser(self.subcommand).dump(settings, skip_none=False)
        config = self.run / CONFIG
        if self.checkpoint is not None and config.is_file():
            changed = changed_keys(yaml.safe_load(config.read_text()), yaml.safe_load(text))
            if changed:
                raise ValueError(
                    f"{self.run} was started with another {', '.join(changed)}; give the run another --name, "
                    "or go on with the settings it has"
                )
            if (self.run / SUMMARY).is_file():
                print(f"{self.run} is finished ({step_of(self.checkpoint):,} steps): nothing to do")
                raise SystemExit(0)
            print(f"{self.run} goes on from {self.checkpoint.name}")
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self.run.mkdir(parents=True, exist_ok=True)
            config.write_text(text)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config[self.subcommand]
        callbacks = list(self._get(self.config_init, "trainer.callbacks") or [])
        loggers: list[Logger] | bool = False
        if self.subcommand == "fit":
            folder = self.run / "checkpoints"
            callbacks += [Speed(), LastCheckpoint(folder, settings.checkpoint.every_n_steps), Summary(self.run)]
            callbacks.append(BestCheckpoint(folder))
            loggers = self.loggers(settings)
        return super().instantiate_trainer(logger=loggers, callbacks=callbacks, **kwargs)

    def loggers(self, settings: Any) -> list[Logger]:
        """CSV always, W&B beside it; both go on where the checkpoint had reached."""
        metrics = MetricsCSV(self.run)
        metrics.begin_at(step_of(self.checkpoint) if self.checkpoint else 0)
        if settings.wandb == "off":
            return [metrics]
        identity = self.run / "wandb_id"
        if not identity.is_file():
            identity.write_text(secrets.token_hex(4))
        offline = settings.wandb == "offline"
        run_id = identity.read_text()
        resume = None if offline else "allow"
        project = os.environ.get("WANDB_PROJECT", "condenser")
        beside = WandbLogger(
            name=settings.name, project=project, save_dir=self.run, id=run_id, resume=resume, offline=offline
        )
        return [metrics, beside]


def fit(args: Sequence[str]) -> None:
    run_cli("fit", args)


def validate(args: Sequence[str]) -> None:
    run_cli("validate", args)


def run_cli(subcommand: str, args: Sequence[str]) -> None:
    quiet()
    RunCLI(
        CondenserModule,
        CondenserDataModule,
        args=[subcommand, *args],
        subclass_mode_model=True,
        seed_everything_default=0,
        save_config_callback=None,
        trainer_defaults={"use_distributed_sampler": False},
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "condenser", "description": __doc__},
    )


def quiet() -> None:
    """Silence warnings that do not apply to this training loop, and advertising."""
    for message in (
        "LightningCLI's args parameter",
        "Using ModelCheckpoint with manual optimization",
        ".*does not have many workers",
        ".*Checkpoint directory .* exists and is not empty",
        ".*isinstance\\(treespec, LeafSpec\\)",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
