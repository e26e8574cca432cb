"""A table keeps every letter: in a pipe, in a wide terminal, in a narrow one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from ray_jobs.whole_table import print_whole

CELLS = ["fashion_mnist-frob", "93.42 to 94.62", "+1.02 to +3.04", "0.0027"]


@pytest.mark.parametrize(("width", "terminal"), [(40, False), (40, True), (120, True), (12, True)])
def test_nothing_of_a_table_is_cut(width: int, terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    table = Table(box=None, pad_edge=False)
    for name in ("setting", "95 % interval", "against sgd", "p"):
        table.add_column(name, no_wrap=True)
    table.add_row(*CELLS)
    print_whole(table, console)
    lines = file.getvalue().splitlines()
    words = " ".join(file.getvalue().split())
    if width > 12:
        assert all(cell in words for cell in CELLS)
    assert "".join(CELLS[0]) in "".join(line.strip() for line in lines)
    assert "…" not in words
    assert console.width == width
    if terminal:
        assert max(map(len, lines)) <= width
    assert (len(lines) == 2) == (not terminal or width == 120)
