"""Heads in files beside a masked LM's: in an export, and in a checkpoint of the authors' code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from condenser.models.condenser import Condenser
from condenser.models.files import load_file, reading
from condenser.models.objective import Objective, class_path

HEAD_FILE = "condenser_head.safetensors"  # of an export
AUTHORS_FILE = "model.pt"


def head_beside(name: str, hub: Mapping[str, Any]) -> tuple[dict[str, Tensor] | None, str | None, dict[str, Any]]:
    """Of a folder or hub name: the head's weights, the class path of its objective and settings of that, as far as the
    files say.

    Raises:
        ValueError: a damaged file, one that would run code, or one without a head.
    """
    if path := file_of(name, HEAD_FILE, hub):
        with reading(path), safe_open(path, "pt") as file:
            head, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        try:
            settings = json.loads(about["head"])
        except (KeyError, ValueError):
            settings = None
        if not isinstance(settings, dict):
            raise ValueError(f"{path} does not say its head's settings: it is damaged, or not what export wrote")
        return head, about.get("objective", class_path(Condenser)), settings
    if path := file_of(name, AUTHORS_FILE, hub):
        state = load_file(path)
        state = state if isinstance(state, dict) else {}
        head = {str(key): value for key, value in state.items() if str(key).startswith("c_head.")}
        if not head:
            raise ValueError(f"{path} holds no head (keys c_head.*): remove it to start without one")
        numbers = {key.split(".")[1] for key in head}
        if numbers != {str(number) for number in range(len(numbers))} or not all(map(torch.is_tensor, head.values())):
            raise ValueError(
                f"{path}: what it holds as c_head.0.*, c_head.1.*, ... are not the weights of so many layers"
            )
        return head, None, {"n_head_layers": len(numbers)}
    return None, None, {}


def file_of(name: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    """Where a file of a folder or hub name is, if there is one."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
    return Path(found) if found else None


def load_head(model: Objective, weights: dict[str, Tensor], origin: str) -> list[str]:
    """Load the parts of a head (``c_head``, ``decoder``, ...) that are there; the names of the others.

    Raises:
        ValueError: a part of another shape.
    """
    own = model.head_state()
    known = parts(own) & parts(weights)
    for name in sorted(own.keys() | weights.keys()):
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (weights, own)]
        if name.split(".")[0] in known and shapes[0] != shapes[1]:
            raise ValueError(
                f"the head in {origin} has another shape than that of a {type(model).__name__} with {model.settings}: "
                f"{name} is {shapes[0]} there and {shapes[1]} here"
            )
    model.load_state_dict({name: w for name, w in weights.items() if name.split(".")[0] in known}, strict=False)
    return sorted(parts(own) - known)


def parts(head: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name in head}
