"""Reading weights that came from elsewhere: nothing in a file is run, and what cannot be read is named in one line."""

import errno
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def load_file(path: str | Path, **options: Any) -> Any:
    """What `torch.save` wrote: tensors and plain values, to the CPU.

    Raises:
        ValueError: a damaged file, or one that holds anything else.
    """
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True, **options)


def write_file(content: Any, file: Any) -> None:
    """`torch.save` to an open file. Raises the system's own error where it fails, which torch's writer hides."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def is_run(name: str | Path) -> bool:
    """Whether it is what is exported before a model is read: a checkpoint, a run folder, or the checkpoints/ of one."""
    path = Path(name)
    of_run = (path / "checkpoints").is_dir() or (path.name == "checkpoints" and path.is_dir())
    return path.suffix == ".ckpt" or (of_run and not (path / "config.json").is_file())


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """What fails while ``source``, a file or a model's folder, is read becomes a ValueError that names it."""
    try:
        check_index(Path(source))
        yield
    except ImportError:
        raise
    except Exception as error:  # the zip, pickle and safetensors readers raise many kinds
        if isinstance(error, OSError) and error.filename:
            raise
        place = source if isinstance(error, ValueError) else weights_in(Path(source))
        raise ValueError(f"{place} cannot be read: {reason(error)}") from error


def check_index(folder: Path) -> None:
    """Raises ValueError where weights in several files are not all in their folder."""
    for index in folder.glob("[!.]*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, TypeError, LookupError, AttributeError):
            raise ValueError(f"{index.name} is damaged") from None
        for name in names:
            if Path(str(name)).name != name:
                raise ValueError(f"{index.name} names a file {name!r} outside of its folder; do not trust its origin")


def weights_in(source: Path) -> str:
    files = sorted(source.glob("model*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    return ", ".join(map(str, files)) or str(source)


def reason(error: Exception) -> str:
    if code := re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error)):
        return f"it would run code ({code[1]}), and only tensors and plain values are read; do not trust its origin"
    sought_too_early = isinstance(error, OSError) and error.errno == errno.EINVAL
    if isinstance(error, pickle.UnpicklingError | EOFError | LookupError | UnicodeDecodeError) or sought_too_early:
        return "it is damaged, or was not written by torch"
    return str(error).split("\n")[0]
