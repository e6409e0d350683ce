"""A run folder: ``runs/<name>/{config.yaml, metrics.csv, checkpoints/, summary.json, wandb/}``, and reading it.

``summary.json`` is written when training has ended, so its presence says that the run is finished.
"""

import csv
import json
import os
import re
import subprocess
import zipfile
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CONFIG = "config.yaml"
SUMMARY = "summary.json"
METRICS = "metrics.csv"
RESULTS = "evaluation/results.json"
ZERO_SHOT_NOTE = (
    "Rows that are not fine-tuned say little about a pre-training that never compared [CLS] vectors (Condenser, "
    "RetroMAE, MLM): after a short one they normally retrieve worse than a random encoder's. Compare fine-tuned rows."
)
COMMIT = "COMMIT"  # beside the code that `condenser launch` copied

SEAL = b"crc32="
SEAL_LENGTH = len(SEAL) + 8

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # metric -> x (steps or tokens), values

PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}  # the trainer's, in full

MAY_CHANGE = {  # settings that do not change what is computed, or only where
    "name",
    "runs_dir",
    "wandb",
    "wandb_artifacts",
    "trace_steps",
    "config",
    "ckpt_path",
    "weights_only",
    "checkpoint",
    "data.store",  # its place; checkpoints know what was in it
    "data.tokens_per_pass",
    "data.num_workers",
    "model.compile",
    "model.cuda_graphs",
    "model.fused_loss",
    "model.gradient_checkpointing",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.profiler",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.enable_checkpointing",
    "trainer.log_every_n_steps",
    "trainer.max_time",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.limit_val_batches",
    "trainer.num_sanity_val_steps",
    "trainer.detect_anomaly",
    "trainer.reload_dataloaders_every_n_epochs",
    "trainer.default_root_dir",
}


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest step first."""
    found = (run / "checkpoints").glob("[!.]*.ckpt")
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name (``last-step=100.ckpt``)."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match[1]) if match else -1


def newest_valid_checkpoint(run: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are reported and passed over. Only those that come into
    question are read, by each device for itself: they have to know before they are connected."""
    for path in checkpoints(run):
        if is_intact(path):
            return path
        say(f"{path} is damaged and is passed over")
    return None


def is_intact(path: Path) -> bool:
    """All bytes are those that were written: their checksum follows them. (The ones in the zip archive that they make
    up leave out its frame; they are asked where there is no other, as in what older versions wrote.)"""
    try:
        with open(path, "rb") as file:
            file.seek(-SEAL_LENGTH, os.SEEK_END)
            end, crc = file.tell(), 0
            sealed = file.read()
            file.seek(0)
            if not sealed.startswith(SEAL):
                with zipfile.ZipFile(file) as archive:
                    return archive.testzip() is None
            while left := end - file.tell():
                crc = zlib.crc32(file.read(min(left, 1 << 20)), crc)
            return seal(crc) == sealed
    except Exception:  # whatever a broken archive leads to
        return False


def seal(crc: int) -> bytes:
    """What follows a checkpoint: programs that read it look for the end of the archive and pass this over."""
    return SEAL + f"{crc:08x}".encode()


def length(max_steps: int, max_epochs: int | None, steps_per_epoch: int | None) -> int | None:
    """Optimizer steps of a whole run: of the two limits, -1 or None where there is none, the one that comes first."""
    ends = [max_steps] if max_steps >= 0 else []
    if max_epochs is not None and max_epochs >= 0 and steps_per_epoch is not None:
        ends.append(max_epochs * steps_per_epoch)
    return min(ends, default=None)


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, leaving out those that may change when a run goes on."""
    old, new = dict(flatten(before)), dict(flatten(now))
    for settings in (old, new):
        given = settings.get("trainer.precision")
        settings["trainer.precision"] = PRECISIONS.get(str(given), given)
    differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    return sorted(key for key in differing if not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; a nest of class_path and init_args is shown as its class and the arguments beside it."""
    for key, value in tree.items():
        path = prefix if key in ("class_path", "init_args") else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def at_least(option: str, given: int | None, least: int) -> None:
    if given is not None and given < least:
        raise ValueError(f"--{option.replace('_', '-')} {given} must be at least {least}")


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON. Raises ValueError for a name that it has twice, of which JSON's own would keep the later."""
    for name, n in Counter(name for name, _ in pairs).items():
        if n > 1:
            raise ValueError(f"{name} is there twice")
    return dict(pairs)


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a name that a mapping has twice, of which YAML's own would keep the later."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, found = super().compose_mapping_node(anchor), set[str]()
        for key, _ in node.value:
            if str(key.value) in found:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            found.add(str(key.value))
        return node


def read_mapping(path: Path) -> Any:
    """The content of a YAML or JSON file, None if there is no such file. ValueError for anything but a mapping."""
    if not path.exists():
        return None
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=unique)
        else:
            content = UniqueKeyLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0)
        if re.match(r" *\t", "".join(text.splitlines()[line : line + 1])):
            raise ValueError(f"{path}, line {line + 1} begins with a tab: YAML is indented by spaces") from error
        said = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise ValueError(f"{path} cannot be read: {said}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is empty, or holds no mapping of names to values: is it damaged?")
    return content


def read_metrics(path: Path, may_be_empty: bool = False) -> Curves:
    """Curves by metric. Of a step that a resumed run logged again, the later row counts; a cut last line does not."""
    points: defaultdict[str, tuple[array, array]] = defaultdict(lambda: (array("q"), array("d")))
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(line for line in file if line.endswith("\n"))
        header = next(reader, ["step"])
        if "step" not in header:
            raise ValueError(f"{path} has no 'step' column but {', '.join(header)}: is it the metrics of a run?")
        for cells in filter(None, reader):
            try:
                step, row = parse_row(header, cells)
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: broken row ({error}): mend or remove it") from error
            for name, value in row.items():
                steps, values = points[name]
                steps.append(step)
                values.append(value)
    points.pop("epoch", None)
    if not points and not may_be_empty:
        raise ValueError(f"{path} holds no values yet: wait until the run has logged its first step")
    return {name: in_order(np.array(steps), np.array(values)) for name, (steps, values) in points.items()}


def in_order(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By step, of each the last value."""
    unique, from_end = np.unique(steps[::-1], return_index=True)
    return unique, values[::-1][from_end]


def parse_row(header: Sequence[str], cells: Sequence[str]) -> tuple[int, dict[str, float]]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells under {len(header)} columns")
    row = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell or name == "step"}
    if not abs(step := row.pop("step")) < 2**63:
        raise ValueError(f"{step} is no number of steps")
    return int(step), row


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "not installed"


def output(*command: str) -> str | None:
    """What a command says, None where it fails or there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    except FileNotFoundError:
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def in_words(row: Mapping[str, Any]) -> str:
    """Which encoder a row of an evaluation is of: 'pre-trained, mean, fine-tuned on 1000 of squad, whitened to 256'."""
    words = [row["model"], *([row["pooling"]] if row.get("pooling") else [])]
    if row.get("trained_on"):
        size = f"{row['train_size']} of " if row.get("train_size") not in (None, "all") else ""
        loss = ", cosine loss" if row.get("pair_loss") == "cosine" else ""
        words.append(f"fine-tuned on {size}{row['trained_on']}{loss}")
    if row.get("whitening") is not None:
        words.append(f"whitened to {row['whitening']}" if row["whitening"] else "whitened")
    return ", ".join(words)
