"""The one look of the tables that commands print, and the files of the figures in them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from condenser.data.store import write_json


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    justify: Literal["left", "right"] = "right",
) -> Table:
    """Rows that begin with what they are of. An empty header is left out. Nothing is taken for rich's markup."""
    shown = Table(
        title=None if title is None else Text(title, "table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_header=any(header),
    )
    for place, name in enumerate(header):
        shown.add_column(Text(name), justify=justify if place else "left", vertical="bottom" if name else "top")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def check_figures(json: str | None, option: str = "--json") -> None:
    """Raises ValueError or OSError before all is measured, not after, where a file could not be written."""
    if json:
        if Path(json).exists() and not Path(json).is_file():  # which renaming a file to it would take away
            raise ValueError(f"{option} {json} is a folder or a device: give a file")
        folder = Path(os.path.realpath(json)).parent
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()


def write_figures(json: str | None, figures: dict[str, Any]) -> None:
    """To the file that ``--json`` names, if it does."""
    if json:
        write_json(Path(os.path.realpath(json)), figures)
