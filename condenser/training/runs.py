"""A run folder: ``runs/<name>/{config.yaml, metrics.csv, checkpoints/, summary.json, wandb/}``, and what is in it.

``summary.json`` is written when training has ended, so its presence says that the run is finished.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
SUMMARY = "summary.json"
METRICS = "metrics.csv"

FREE = {  # settings that do not change what is computed, or only where
    "name",
    "runs_dir",
    "wandb",
    "config",
    "ckpt_path",
    "weights_only",
    "checkpoint",
    "data.num_workers",
    "model.gradient_checkpointing",
    *(
        f"trainer.{key}"
        for key in (
            "accelerator",
            "devices",
            "num_nodes",
            "strategy",
            "callbacks",
            "logger",
            "profiler",
            "enable_progress_bar",
            "enable_model_summary",
            "enable_checkpointing",
            "log_every_n_steps",
            "val_check_interval",
            "default_root_dir",
        )
    ),
}


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest step first."""
    found = (run / "checkpoints").glob("*.ckpt")
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name (``last-step=100.ckpt``)."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match[1]) if match else -1


def newest_valid_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose bytes are whole; damaged ones are reported and passed over."""
    for path in checkpoints(run):
        if is_whole(path):
            return path
        print(f"{path} is damaged and is passed over")
    return None


def is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, leaving out those that may change when a run goes on."""
    old, new = flat(before), flat(now)
    differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    return sorted(key for key in differing if not any(key == free or key.startswith(free + ".") for free in FREE))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys; ``init_args`` levels are left out of the names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            leaves |= flat(value, name)
        else:
            leaves[name] = list(value) if isinstance(value, tuple) else value
    return leaves
