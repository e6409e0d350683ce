"""Tables of measurements, and the clock."""

import contextlib
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

Measured = dict[str, list[float]]  # figures of each round, by what was measured


def show(console: Any, title: str, measured: Measured, compared: bool = False) -> None:
    """A table; several ways to do one thing are ``compared`` with the last of them."""
    from rich.table import Table

    table = Table("", "median", "range", *(["ratio"] if compared else []), title=title, title_justify="left")
    reference = list(measured.values())[-1]
    for name, figures in measured.items():
        row = [name, f"{median(figures):.3g}", f"{min(figures):.3g} to {max(figures):.3g}"]
        if compared:
            row.append(f"{median(a / b for a, b in zip(figures, reference, strict=True)):.2f}")
        table.add_row(*row)
    console.print(table)


@contextlib.contextmanager
def timed(figures: list[float], amount: float = 0.0) -> Iterator[None]:
    """Adds the seconds that the block took, or ``amount`` per second."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    figures.append(amount / seconds if amount else seconds)
