"""Recipes by name: `condenser fit --config condenser -c ddp`, from a clone's configs/ or from those in the package."""

import re
from collections.abc import Sequence
from pathlib import Path

INSTALLED, CLONED = Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs"
FOLDER = INSTALLED if INSTALLED.is_dir() else CLONED
OPTIONS = ("--config", "-c")
HELP = "a YAML file, or the name of a recipe; several are laid over each other, the later ones winning"


def recipes() -> dict[str, Path]:
    """The recipes, and the overlays for them, by name."""
    folders = (FOLDER, *(FOLDER / name for name in ("hardware", "languages", "ablations")))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def file_of(given: str) -> str:
    """What is given as a configuration. A name, without suffix or slash, that is no file is a recipe's.

    Raises:
        ValueError: no recipe has the name.
    """
    if not re.fullmatch(r"[\w-]+", given) or Path(given).is_file():
        return given
    known = recipes()
    if given not in known:
        raise ValueError(f"--config {given} is neither a file nor a recipe; there are {', '.join(known)}")
    return str(known[given])


def with_files(args: Sequence[str]) -> list[str]:
    """A command line in which recipes that are given by name are files."""
    found, before = list[str](), ""
    for word in args:
        option, is_given, value = word.partition("=")
        if is_given and option in OPTIONS:
            word = f"{option}={file_of(value)}"
        found.append(file_of(word) if before in OPTIONS else word)
        before = word
    return found
