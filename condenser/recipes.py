"""Recipes by name: `condenser fit --config condenser -c ddp`, from a clone's configs/ or from those in the package."""

import argparse
import difflib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from condenser.runs import read_mapping

INSTALLED, CLONED = Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs"
FOLDER = INSTALLED if INSTALLED.is_dir() else CLONED
WRONG = (AttributeError, ImportError, KeyError, TypeError, ValueError)  # what settings lead to
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


class Parser(ArgumentParser):
    """Raises errors, which `condenser.cli` says in one line, with the nearest setting to one that it does not know."""

    of_model: Sequence[str] = ()  # names that it does not hold itself

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"exit_on_error": False, "allow_abbrev": False})

    def error(self, message: str, *args: Any) -> Any:
        pattern = r"(?:unrecognized arguments: --|(?:Group '([\w.]+)' does not accept )?[Oo]ption ')([\w.-]+)"
        unknown = re.search(pattern, message)
        if re.search(r"are required: \w+\.model\b", message):
            message = "no model is set: give --config RECIPE (such as --config demo)"
        elif unknown and "did you mean" not in message:
            message += hint(".".join(filter(None, unknown.groups())), self)
        super().error(message, *args)


class ConfigFile(ActionConfigFile):
    """A file of settings; of `fit`, a recipe by its name too. Errors in it name the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        known = {name.partition(".")[0] for name in names(parser)}
        is_of_fit = "trainer" in known
        values = file_of(values) if is_of_fit else values
        content = read_mapping(Path(values)) if os.path.isfile(values) else {}
        sections = {name: content[name] for name in ("model", "data", "trainer", "checkpoint") if name in content}
        has_settings_of_fit = any(isinstance(section, dict) for section in sections.values())
        if not is_of_fit and (has_settings_of_fit or (not content and values in recipes())):
            raise ValueError(f"{values} is a recipe of `condenser fit`; -c takes settings of this command alone")
        if unknown := [name for name in map(str, content) if name.rstrip("+") not in known]:
            why = "; dots are for the command line: nest names" if "." in unknown[0] else hint(unknown[0], parser)
            raise ValueError(f"{values}: there is no setting {unknown[0]}{why}")
        if bare := [name for name, section in sections.items() if not isinstance(section, dict | str)]:
            raise ValueError(f"{values}: {bare[0]} has no settings below it, indented: give some, or leave it out")
        try:
            super().__call__(parser, cfg, values, option_string)
            parser.validate(cfg, skip_required=True)  # now, while it is known which file an error is in
        except (argparse.ArgumentError, *WRONG) as error:
            parser.error(f"{values}: {error}")


def parser_beside_fit(prog: str, description: str) -> argparse.ArgumentParser:
    """For the options of a command that leaves all others to `fit`."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="The settings of `condenser fit` come beside these (--config, -c, --model.*, --data.*, --trainer.*): "
        "see `condenser fit --help`. Unknown ones are refused.",
        allow_abbrev=False,
        exit_on_error=False,
    )


def hint(unknown: str, parser: Any) -> str:
    """The nearest setting, or nothing."""
    known, unknown = names(parser), unknown.replace("-", "_")
    same = [name for name in known if name.rpartition(".")[2] == unknown]
    near = same or difflib.get_close_matches(unknown, known, 1)
    return f": did you mean {near[0]}?" if near else ""


def names(parser: Any) -> list[str]:
    """Of its settings, and of those of commands within it."""
    within = [action.choices.values() for action in parser._actions if isinstance(action.choices, dict)]
    found = [name for inner in itertools.chain(*within) for name in names(inner)]
    return [*found, *(action.dest for action in parser._actions), *parser.of_model]
