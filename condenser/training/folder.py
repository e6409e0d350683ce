"""The folder of a run before training begins: where the run goes on, whether it may, and that nobody else is in it."""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from condenser.data.datamodule import store_folder
from condenser.data.lock import locked
from condenser.data.store import atomic_write, check_same_stores, read_manifest
from condenser.export import find_checkpoint
from condenser.models.files import load_file
from condenser.runs import CONFIG, METRICS, SUMMARY, is_intact, newest_valid_checkpoint, read_mapping, step_of
from condenser.training.checkpoints import remove_leftovers
from condenser.training.ending import goes_on


def is_first_rank() -> bool:
    known: Any = rank_zero_only
    return known.rank == 0


def check_processes(trained_by: int) -> None:
    """Raises ValueError where several processes were started, as by torchrun, and the trainer has one: each would train
    the whole run, into one folder."""
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if trained_by == 1 and (started > 1 or not is_first_rank()):
        raise ValueError(
            "several processes were started, and the trainer has one: give --trainer.devices the number of each node's "
            "processes, and --trainer.num_nodes that of the nodes"
        )


def run_folder(name: str | None, runs_dir: str) -> Path:
    """Raises ValueError for a name that there is not, or that leads out of ``runs_dir``."""
    if not name:
        raise ValueError("the run needs a name: --name NAME, or name: in the configuration")
    path = os.path.normpath(name)
    if Path(path).is_absolute() or path.split(os.sep)[0] in (".", ".."):
        raise ValueError(f"--name {name}: it must name a folder inside --runs_dir {runs_dir}")
    run = Path(runs_dir) / path
    for folder in run.parents[: path.count(os.sep)]:
        if (folder / CONFIG).exists():
            raise ValueError(f"--name {name}: {folder} is a run itself")
    return run


def intact(given: str) -> Path:
    """A checkpoint. Raises ValueError for another file, or none."""
    if not is_intact(Path(given)):
        raise ValueError(f"--ckpt_path {given} is missing, damaged, or no checkpoint: give a file of checkpoints/")
    return Path(given)


def starting_point(run: Path, given: str | None, fits: bool) -> Path | None:
    """The checkpoint to validate, or to go on from (``fits``): a run that has its own goes on from that."""
    if given == "best" and fits:
        raise ValueError("--ckpt_path best: a run goes on from its last checkpoint; to begin another, give a file")
    newest = newest_valid_checkpoint(run, say=rank_zero_only(print))
    if given in (None, "last"):
        return newest
    path = find_checkpoint(str(run), best=True) if given == "best" else intact(str(given))
    return newest if newest is not None and fits else path


def check_may_run(run: Path, checkpoint: Path | None, settings: dict[str, Any]) -> None:
    """See that a run with these ``settings`` may begin, or go on from ``checkpoint``.

    Raises:
        ValueError: it was begun with other settings or stores, or has lost its checkpoints.
        SystemExit: it is finished.
    """
    data = settings["data"]
    stores = [store_folder(name) for name in ([data["store"]] if data["store"] else data["stores"] or ())]
    if checkpoint is not None:
        before, content = read_mapping(run / CONFIG) or {}, load_file(checkpoint, mmap=True)
        is_left = goes_on(run, checkpoint, settings)
        is_elsewhere = before.get("data", {}).get("store") != data["store"]
        if "stores" in content and (is_left or is_elsewhere):
            check_same_stores(content["stores"], stores, checkpoint)
        if not is_left:
            print(f"{run} is finished ({step_of(checkpoint):,} steps): nothing to do")
            raise SystemExit(0)
    elif (run / SUMMARY).is_file():
        raise ValueError(
            f"{run} has ended ({SUMMARY}), and none of its checkpoints is there and whole: give another --name, or "
            "remove the folder to begin anew"
        )
    for store in stores:
        read_manifest(store)


def begin(run: Path, checkpoint: Path | None, config: str, held: ExitStack) -> None:
    """Make the folder, write the ``config`` into it, and keep other processes out until ``held`` is closed.

    Raises:
        ValueError: it is no run's, or another process is in it.
    """
    ours = any((run / name).exists() for name in ("lock", "checkpoints", METRICS))
    if (run / CONFIG).exists() and not ours:
        raise ValueError(f"{run} has a {CONFIG} and is no run of ours: give another --name or --runs_dir")
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    if new:
        held.callback(remove_if_not_begun, run, new[1:])
    busy = f"{run} is being trained by {{holder}}: wait for its end, stop it, or give another --name"
    held.enter_context(locked(run / "lock", busy))
    if checkpoint is not None:
        print(f"{run} goes on from {checkpoint}")
    else:
        (run / "wandb_id").unlink(missing_ok=True)  # what begins anew is another W&B run
    remove_leftovers(run)
    (run / SUMMARY).unlink(missing_ok=True)
    with atomic_write(run / CONFIG) as partial:  # other processes may read it now
        partial.write_text(config, encoding="utf-8")


def remove_if_not_begun(run: Path, around: Sequence[Path]) -> None:
    """A folder in which there is nothing but the settings: something was refused before training began. The folders
    ``around`` it go too, the innermost first, as far as nothing else is in them."""
    if not any(path.stat().st_size for path in run.iterdir() if path.name != CONFIG):
        shutil.rmtree(run)
        with suppress(OSError):
            for folder in around:
                folder.rmdir()
