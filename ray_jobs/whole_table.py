"""Tables of which no column and no word is cut, however narrow the place is."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_UNLIMITED = 100_000  # columns of letters


def print_whole(table: Table, console: Console) -> None:
    """Prints a table: in a file or a pipe as wide as it is, in a narrow terminal as a paragraph for each row."""
    width = console.measure(table, options=console.options.update(width=_UNLIMITED)).maximum
    if width <= console.width:
        console.print(table)
    elif not console.is_terminal:
        narrow, console.width = console.width, width
        try:
            console.print(table)
        finally:
            console.width = narrow
    else:
        _print_rows(table, console)


def _print_rows(table: Table, console: Console) -> None:
    """The first cell, and below it the others, each after its column's name."""
    names = [str(column.header) for column in table.columns]
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        console.print(Text(str(first), style="bold"))
        parts = [Text.assemble((f"{name} ", "dim"), str(cell)) for name, cell in zip(names[1:], others, strict=True)]
        console.print(Padding(Text("   ").join(parts), (0, 0, 0, 2)))
