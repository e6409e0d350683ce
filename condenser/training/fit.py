"""`condenser fit` and `condenser validate`: Lightning's command line, over run folders that resume themselves.

`condenser fit --config C.yaml --name N` writes ``runs/N``. The same command goes on from the newest valid checkpoint
there; a finished run says so; a changed setting is refused by name (devices may change).
"""

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import lightning as L
import torch
import yaml
from jsonargparse.typing import NonNegativeInt, register_type
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from condenser.cluster import signals
from condenser.data.datamodule import CondenserDataModule, check_shared
from condenser.recipes import HELP, ConfigFile, Parser, recipes
from condenser.runs import SUMMARY, flatten, step_of
from condenser.training import tracking
from condenser.training.checkpoints import Checkpointing, Checkpoints, WholeFiles
from condenser.training.ending import SIGNAL, Ending
from condenser.training.failures import explained, in_one_line
from condenser.training.flags import check_callbacks, check_trainer
from condenser.training.folder import begin, check_may_run, check_processes, is_first_rank, run_folder, starting_point
from condenser.training.logs import Listening, MetricsCSV, Speed, Trace, versions
from condenser.training.module import CondenserModule

# Lightning has members of enumerations for defaults, which a configuration holds by their values
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
register_type(torch.device)  # a default of callbacks of Lightning's

USAGE = "condenser {} -c RECIPE [-c FILE ...] --name NAME [--SETTING VALUE ...]"
FIT_HELP = {
    "usage": USAGE.format("fit"),
    "description": "Train, or go on with a run from its newest checkpoint: the same command does both. All goes to "
    "RUNS_DIR/NAME. Of recipes and files the later win, and over all of them settings that are given here by name, as "
    "--data.batch_size 512 or --trainer.devices 8; --print_config shows what comes of it.",
}
VALIDATE_HELP = {
    "usage": USAGE.format("validate"),
    "description": "Validate a run's newest checkpoint, or that of --ckpt_path, with the settings of its fit.",
}


class FitParser(Parser, LightningArgumentParser):
    """Those that it makes are such too."""

    of_model = tuple(f"model.{name}" for name in inspect.signature(CondenserModule).parameters)


class RunCLI(LightningCLI):
    """LightningCLI with a run folder.

    Args:
        held: what is let go of when the run has ended.
    """

    def __init__(self, *args: Any, held: ExitStack, **kwargs: Any):
        self.held = held
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As Lightning's, but its help knows of recipes."""
        parser = FitParser(dump_header=[f"lightning.pytorch=={L.__version__}"], **kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help=f"{HELP}: {', '.join(recipes())}")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, help="name of the run: everything goes to RUNS_DIR/NAME")
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--wandb",
            type=Literal["online", "offline", "off"] | Literal[False],
            default="off",
            help="Weights & Biases beside the CSV; YAML reads off as False, which is the same",
        )
        parser.add_argument(
            "--wandb_artifacts",
            type=bool,
            default=False,
            help="keep settings, versions and manifests at W&B, and the finished run's export (RUNS_DIR/NAME/export)",
        )
        parser.add_argument(
            "--trace_steps",
            type=NonNegativeInt,
            default=0,
            help="profile so many steps, after five: trace.json.gz and trace.txt in the run folder",
        )
        parser.add_class_arguments(Checkpointing, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        try:
            parser.validate(self.config, skip_unset=False)  # also what a file has as null
        except TypeError as error:
            parser.error(str(error))
        check_values(self.config[self.config.subcommand])
        for key, value in [*self.config.items()]:
            if isinstance(value, str):
                self.config[key] = os.path.expanduser(value)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take settings out of the checkpoint here; a run's settings are in its configuration."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        check_trainer(settings.trainer)
        self.run, fits = run_folder(settings.name, settings.runs_dir), self.subcommand == "fit"
        if settings.trainer.fast_dev_run and fits:
            self.run = Path(self.held.enter_context(TemporaryDirectory(prefix="fast-dev-run-")))
            if settings.ckpt_path is not None:
                raise ValueError("trainer.fast_dev_run begins anew: leave --ckpt_path out")
        self.checkpoint = starting_point(self.run, settings.ckpt_path, fits)
        if fits:
            text = dumped(self)
            check_may_run(self.run, self.checkpoint, yaml.safe_load(text))
            if is_first_rank():
                begin(self.run, self.checkpoint, text, self.held)
        elif self.checkpoint is None:
            raise ValueError(f"{self.run} has no checkpoint to validate; give one with --ckpt_path")
        elif settings.trainer.limit_val_batches == 0:
            raise ValueError("trainer.limit_val_batches=0 leaves nothing to validate on")
        settings.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        settings.trainer.default_root_dir = str(self.run)

    @in_one_line("trainer")
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config_init[self.subcommand]
        callbacks, plugins = as_list(settings.trainer.callbacks), as_list(settings.trainer.plugins)
        check_callbacks(callbacks)
        loggers: list[Any] = []
        if self.subcommand == "fit":
            callbacks += [Listening(), Speed(), Ending(self.run)]
            if settings.trainer.enable_checkpointing is False:
                print(f"trainer.enable_checkpointing=false: {self.run} will not be able to go on")
            else:
                callbacks.append(Checkpoints(self.run / "checkpoints", settings.checkpoint))
            if settings.trace_steps:
                callbacks.append(Trace(self.run, settings.trace_steps))
            loggers = [*self.loggers(settings), *as_list(settings.trainer.logger, but=True)]
        plugins.append(WholeFiles(before=loggers[0].flush) if loggers else WholeFiles())
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's own requeue acts in a signal handler
        trainer = super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)
        check_processes(trainer.world_size)
        # before other processes are started
        check_shared(self.datamodule.micro_batches_per_step, trainer.num_nodes * trainer.num_devices)
        return trainer

    def loggers(self, settings: Any) -> list[Logger]:
        """CSV always, W&B beside it on the first rank; both go on where the checkpoint had reached."""
        every_n_steps = settings.trainer.log_every_n_steps or 50  # Lightning's default
        metrics = MetricsCSV(self.run, every_n_steps)
        metrics.begin_at(step_of(self.checkpoint) if self.checkpoint else 0)
        if settings.wandb in ("off", False) or settings.trainer.fast_dev_run or not is_first_rank():
            return [metrics]
        tracker = tracking.tracker(self.run, settings.wandb, every_n_steps)
        tracking.describe(tracker, self.run, self.datamodule.weights, versions(), keep=settings.wandb_artifacts)
        return [metrics, tracker]


def check_values(settings: Any) -> None:
    """Raises ValueError for what a parser lets pass: null where a module has another default, what is no seed."""
    parameters, seed = inspect.signature(CondenserModule).parameters, settings.seed_everything
    for name, value in settings.model.init_args.items():
        if value is None and name in parameters and parameters[name].default is not None:
            raise ValueError(f"model.{name} is null: give it a value, or leave it out")
    for name, value in flatten(settings.model.init_args.as_dict()):
        if value == "None":  # which jsonargparse makes of a null below a setting
            raise ValueError(f"model.{name} is the text None: write null, in a file of settings (-c FILE)")
    if seed is True or not 0 <= seed < 2**32:  # of True Lightning makes a seed
        raise ValueError(f"seed_everything={seed}: give a number from 0 to {2**32 - 1}")


class DryCLI(RunCLI):
    """Settings, module and data module of a run that is not started."""

    def before_instantiate_classes(self) -> None:
        check_trainer(self.config[self.subcommand].trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        check_callbacks(as_list(self.config_init[self.subcommand].trainer.callbacks))

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def dumped(cli: RunCLI) -> str:
    """Its settings as YAML."""
    parser = cli._parser(cli.subcommand)  # the subcommand's, which Lightning keeps to itself
    return parser.dump(cli.config[cli.subcommand], skip_none=False)


def as_list(value: Any, but: Any = None) -> list[Any]:
    """Of what may be one thing or a list of them, or none: None, ``but``."""
    if value is None or value is but:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def fit(args: Sequence[str]) -> None:
    with tracking.finished(), ExitStack() as held:
        with explained(), interrupted():
            cli = run_cli("fit", args, held=held)
        trackers = [logger for logger in cli.trainer.loggers if isinstance(logger, tracking.Tracker)]
        if (cli.run / SUMMARY).is_file():
            if trackers and cli.config["fit"].wandb_artifacts:
                tracking.keep_export(trackers[0], cli.run)
        elif cli.model.stopped == SIGNAL:
            leave(cli)


@contextmanager
def interrupted() -> Iterator[None]:
    """Says how training ended where it was interrupted at once, which Lightning makes an exit of."""
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        if is_first_rank():
            print("interrupted at once: start it again to go on from the newest checkpoint")
        raise SystemExit(128 + signals.INTERRUPT) from None


def leave(cli: RunCLI) -> None:
    """End with the code that says that a signal stopped training."""
    environment = getattr(cli.trainer.strategy, "cluster_environment", None)
    if isinstance(environment, LightningEnvironment) and environment.local_rank():
        return  # at any other code Lightning kills the first process, which may still have something to do
    again = cli.model.guard.requeue and "SLURM_JOB_ID" in os.environ
    if signals.INTERRUPT in signals.received:
        raise SystemExit(128 + signals.INTERRUPT)
    raise SystemExit(signals.AGAIN if again else signals.STOPPED)


def validate(args: Sequence[str]) -> None:
    if not len(run_cli("validate", args).datamodule.validation):
        raise ValueError("the store has no validation split: prepare it with a larger --validation-fraction")


def run_cli(subcommand: str, args: Sequence[str], cli: type[RunCLI] = RunCLI, held: ExitStack | None = None) -> RunCLI:
    quiet()
    return cli(
        CondenserModule,
        CondenserDataModule,
        args=[subcommand, *args],
        held=held or ExitStack(),
        subclass_mode_model=True,
        seed_everything_default=0,
        save_config_callback=None,
        trainer_defaults={"use_distributed_sampler": False},
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "condenser", "description": __doc__, "fit": FIT_HELP, "validate": VALIDATE_HELP},
    )


def quiet() -> None:
    """Silence warnings that do not apply to this training loop, and advertising."""
    for message in (
        "LightningCLI's args parameter",
        "Using ModelCheckpoint with manual optimization",
        ".*does not have many workers",
        ".*is not supported by the model summary",
        "The `srun` command is available on your system but is not used",
        ".*callbacks used to create the checkpoint need to be provided",
        ".*Checkpoint directory .* exists and is not empty",
        "Total length of `list` across ranks is zero",  # no validation split, as `prepare` has said
        ".*isinstance\\(treespec, LeafSpec\\)",
        "It is recommended to use `self.log",  # with sync_dist: what is logged is the same on all devices
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
