"""Weights & Biases beside the CSV: one W&B run for a run folder, however often it is started, by the first rank alone.

Training does not depend on it: a server that does not answer costs half a minute at the start and at the end. What has
not reached it is in the run folder, where `wandb sync` finds it.
"""

import csv
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.loggers import WandbLogger

from condenser.cluster import signals
from condenser.data.store import MANIFEST, atomic_write, names_of
from condenser.export import ABOUT_FILE, export, find_checkpoint, sha256
from condenser.runs import CONFIG, METRICS, read_mapping, step_of
from condenser.training.failures import one_line
from condenser.training.logs import is_repeated

PATIENCE = {"init_timeout": 30.0, "finish_timeout": 30.0}  # seconds; WANDB_INIT_TIMEOUT sets the first


class Tracker(WandbLogger):
    """Lightning's W&B logger; W&B's failures do not reach training."""

    lost = False
    known: Mapping[str, Any] = {}  # the last values that W&B has of a run that it goes on with

    def __init__(self, every_n_steps: int, **options: Any):
        super().__init__(**options)
        self.every_n_steps = every_n_steps

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        if self.lost or is_repeated(metrics, step, self.every_n_steps):
            return
        last = self.known.get("trainer/global_step", -1)
        is_known = all(self.known.get(name) == value for name, value in metrics.items() if name[:5] != "perf/")
        try:
            if step > last or (step == last and not is_known):
                super().log_metrics(metrics, step)
        except Exception as error:  # the process that sends is gone, for one
            self.lost = True
            warn(f"no longer takes metrics ({one_line(error)}); training goes on, and metrics.csv has them all")

    def catch_up(self, path: Path) -> None:
        """Send what starts before this one have written to ``path`` and W&B has not: a sender that is killed takes the
        last rows with it. Rows that W&B has are not sent again."""
        self.known = dict(self.experiment.summary)
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                self.log_metrics({name: float(value) for name, value in row.items() if value}, step)


def tracker(run: Path, mode: Literal["online", "offline"], every_n_steps: int) -> Tracker:
    """The logger of this run folder's W&B run; one that W&B cannot take now is written offline.

    Raises:
        ValueError: there is no key, what is given cannot be one, or the environment has what W&B does not take.
    """
    import wandb

    for path in (run / "wandb").glob("*run-*/*.wandb"):
        if path.stat().st_size < 8:  # nothing but the header, of a start that was killed: `wandb sync` would end at it
            shutil.rmtree(path.parent)
    try:
        if mode == "online":
            check_key()
        logger = logger_of(run, mode, every_n_steps)
        if logger.experiment.resumed:  # which it is online alone
            logger.catch_up(run / METRICS)
    except (ValueError, wandb.errors.UsageError) as error:
        raise ValueError(f"--wandb {mode}: {one_line(error)}") from None
    except Exception as error:  # of the network, the key, or the process that is to send
        warn(f"cannot be reached ({one_line(error)}); later: wandb sync {run}/wandb/offline-run-*")
        forget(wandb)  # which else takes the run's id to be in use
        logger = logger_of(run, "offline", every_n_steps)
        _ = logger.experiment
    return logger


def check_key() -> None:
    import wandb

    if (asked := os.environ.get("WANDB_MODE") or "online") != "online":
        raise ValueError(f"the environment has WANDB_MODE={asked}: unset it, or change --wandb")
    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        raise ValueError(f"{one_line(error)}; run `wandb login`") from None
    if not found:
        raise ValueError("there is no key: run `wandb login`, or take offline and `wandb sync` the run later")


def logger_of(run: Path, mode: str, every_n_steps: int) -> Tracker:
    from wandb import Settings

    patience: Any = {name: seconds for name, seconds in PATIENCE.items() if f"WANDB_{name.upper()}" not in os.environ}
    return Tracker(
        every_n_steps,
        name=run.name,
        project=os.environ.get("WANDB_PROJECT", "condenser"),
        save_dir=run,
        id=run_id(run),
        resume="allow",  # offline too: then what is synced later is appended
        mode=mode,
        settings=Settings(disable_git=True, save_code=False, **patience),  # a remote's address can hold a password
    )


def run_id(run: Path) -> str:
    """The W&B id that a run keeps however often it is started; a copy of its folder by another name has its own."""
    path, of_name = run / "wandb_id", f"{zlib.crc32(run.name.encode()):08x}"
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not known or known[8:] not in ("", of_name):
        known = secrets.token_hex(4) + of_name
        with atomic_write(path) as partial:
            partial.write_text(known, encoding="utf-8")
    return known


def describe(logger: Tracker, run: Path, weights: Mapping[Path, float], versions: dict[str, str], keep: bool) -> None:
    """Show the settings, the versions and the stores' checksums with the run, and ``keep`` them as an artifact."""
    names = names_of(weights)
    about = {
        "settings": yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")),
        "versions": versions,
        "stores": {
            names[folder]: {"weight": weight, "manifest_sha256": sha256(folder / MANIFEST)}
            for folder, weight in weights.items()
        },
    }
    logger.experiment.config.update(about, allow_val_change=True)
    if keep:
        files = {CONFIG: run / CONFIG, **{f"{names[folder]}/{MANIFEST}": folder / MANIFEST for folder in weights}}
        keep_files(logger, "settings", files, {key: about[key] for key in ("versions", "stores")})


def keep_export(logger: Tracker, run: Path) -> None:
    """Export a finished run's last checkpoint to ``RUN/export`` and keep it as an artifact."""
    target = run / "export"
    try:
        path, about = find_checkpoint(str(run)), (read_mapping(target / ABOUT_FILE) or {}).get("source", {})
        if about.get("step", step_of(path)) < step_of(path) and not about.get("options"):  # the run was made longer
            target.rename(run / f"export-step={about['step']}")
        export(path, target)
    except (ValueError, OSError) as error:
        warn(f"gets no export: {error}")
        return
    files = [path for path in target.rglob("*") if path.is_file()]
    keep_files(logger, "model", {str(path.relative_to(target)): path for path in files}, {})


def keep_files(logger: Tracker, kind: str, files: Mapping[str, Path], about: dict[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{kind}-{logger.experiment.id}", type=kind, metadata=about)
    try:
        for name, path in files.items():  # which are copied
            artifact.add_file(str(path), name=name)
        logger.experiment.log_artifact(artifact)
    except Exception as error:  # it asks the server first
        warn(f"does not take the artifact {artifact.name} ({one_line(error)})")


@contextmanager
def finished() -> Iterator[None]:
    """Ends the W&B run that began within, with the exit code; what it still has to send is given half a minute."""
    code: Any = 1
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code
        raise
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            try:
                if code in (signals.STOPPED, signals.AGAIN):
                    wandb.run.mark_preempting()
                wandb.finish(exit_code=code)
            except Exception as error:
                warn(f"has not taken everything ({one_line(error)})")
                forget(wandb)


def forget(wandb: Any) -> None:
    """End the process that sends for us, with what it may still hold; the next is a new one."""
    with suppress(Exception):
        wandb.teardown(exit_code=1)
    os.environ.pop("WANDB_SERVICE", None)


def warn(message: str) -> None:
    print(f"W&B {message}", file=sys.stderr)
