"""The one look of the tables that commands print."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.table import Table


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    justify: Literal["left", "right"] = "right",
) -> Table:
    """Rows that begin with what they are of. An empty header is left out."""
    shown = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_header=any(header),
    )
    for place, name in enumerate(header):
        shown.add_column(name, justify=justify if place else "left", vertical="bottom" if name else "top")
    for row in rows:
        shown.add_row(*row)
    return shown
