"""Tables that fit the terminal without cutting words or numbers, and the words for kinds of adapters."""

from collections.abc import Mapping, Sequence
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loramux_shared.bundle.kinds import AdapterKind
from loramux_shared.wording import counted, listed

GAP = 2
"""Columns of the terminal between two of the table."""
NOTHING = ("", "-")
"""Cells that say nothing."""


def fitting_columns(
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
    """Return a table no wider than ``width``: cells continue in a next line between words, the widest first.

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
        cells = [(header, cell) for header, cell in zip(headers, row, strict=True) if cell not in NOTHING]
        lines += [
            Text.assemble((header.ljust(names + GAP), "bold"), cell, overflow="fold") for header, cell in cells
        ]
    return Group(*lines)


_NAMES: Final = {
    AdapterKind.LORA: "LoRA",
    AdapterKind.ADALORA: "AdaLoRA",
    AdapterKind.VERA: "VeRA",
    AdapterKind.LOHA: "LoHa",
    AdapterKind.LOKR: "LoKr",
    AdapterKind.MISS: "MiSS",
    AdapterKind.DORA: "DoRA",
    AdapterKind.IA3: "IA3",
}


def kind(kinds: Sequence[str], replaced_rows: Mapping[str, int] | None = None, num_labels: int = 0) -> str:
    """Return kinds in one line, with how many rows are replaced and labels scored: ``LoRA, head (12 rows)``.

    One that is not known here, of a newer service, is shown as it is.
    """
    counts = {each: f" ({count} rows)" for each, count in (replaced_rows or {}).items()}
    if num_labels:
        labels = f" ({counted(num_labels, 'label')})"
        counts |= {AdapterKind.CLASSIFIER: labels, AdapterKind.TOKEN_CLASSIFIER: labels}
    words = {each: _NAMES.get(AdapterKind(each), each) if each in set(AdapterKind) else each for each in kinds}
    return ", ".join(word + counts.get(each, "") for each, word in words.items())


def task(kinds: Sequence[str], labels: Sequence[str] = (), problem_type: str = "") -> str:
    """Return what an adapter is asked for that generates no text; empty of one that does."""
    scored = {AdapterKind.CLASSIFIER: "texts", AdapterKind.TOKEN_CLASSIFIER: "tokens"}
    if found := [what for each, what in scored.items() if each in kinds]:
        called = f" ({problem_type})" if problem_type else ""
        return f"scores {found[0]}, and generates none{called}: {listed(labels)}"
    return "makes vectors of texts, and generates none" if AdapterKind.ENCODER in kinds else ""
