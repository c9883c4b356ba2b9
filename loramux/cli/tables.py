"""Tables on a terminal: as wide as it is, and never with half a word or half a number in a cell."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

GAP = 2
"""Columns of the terminal between two of the table."""
NOTHING = ("", "-")
"""Cells that say nothing."""


def kept(
    headers: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str], width: int
) -> tuple[list[int], list[str]]:
    """Return the places of the columns that fit a line each row, and the headers of those that were left out.

    Columns of ``spare`` go, the first ones first, until the others fit; all others stay.
    """
    widths = {
        header: max(map(cell_len, column)) for header, *column in zip(headers, headers, *rows, strict=True)
    }
    left_out: list[str] = []
    for header in spare:
        if sum(widths.values()) + GAP * (len(widths) - 1) <= width:
            break
        if widths.pop(header, None) is not None:
            left_out.append(header)
    return [i for i, header in enumerate(headers) if header in widths], left_out


def fitted(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str], width: int
) -> RenderableType:
    """Return a table no wider than ``width``: cells go on in a next line between words, the widest first.

    Where that is not enough, each row is a block of lines, one for each cell that says something, as psql
    does it with ``\\x auto``. ``right`` are the headers of columns with numbers.
    """
    columns = list(zip(headers, *rows, strict=True))
    room = width - GAP * (len(columns) - 1)
    widths = _widths(columns, room)
    if widths is None:
        return _blocks(headers, rows)
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for header, columns_of_terminal in zip(headers, widths, strict=True):
        grid.add_column(
            header, justify="right" if header in right else "left", width=columns_of_terminal, overflow="fold"
        )
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Return how wide each column is, or None where the longest words of all of them have no room."""
    widths = [max(map(cell_len, column)) for column in columns]
    least = [max(cell_len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    if sum(least) > room:
        return None
    while sum(widths) > room:
        _, widest = max((width, i) for i, width in enumerate(widths) if width > least[i])
        widths[widest] -= 1
    return widths


def _blocks(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Group:
    names = max(map(cell_len, headers))
    lines: list[Text] = []
    for row in rows:
        if lines:
            lines.append(Text())
        said = [(header, cell) for header, cell in zip(headers, row, strict=True) if cell not in NOTHING]
        lines += [
            Text.assemble((header.ljust(names + GAP), "bold"), cell, overflow="fold") for header, cell in said
        ]
    return Group(*lines)
