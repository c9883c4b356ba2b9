"""Tables are as wide as the terminal, whatever that is, and no word or number of them is broken."""

from __future__ import annotations

import pytest
from rich.console import Console

from loramux.cli.tables import fitted, fitting_columns

HEADERS = ("model", "modules", "first, ms")
ROWS = (("SmolLM2-135M-Instruct", "-", "87/111/1110"), ("bård", "attn q k v dense, mlp gate", "5/5/5"))


def _lines(width: int) -> list[str]:
    screen = Console(width=width)
    with screen.capture() as stated:
        screen.print(fitted(HEADERS, ROWS, frozenset({"first, ms"}), width))
    return stated.get().splitlines()


@pytest.mark.parametrize("width", [64, 63, 43, 42, 30, 24])
def test_no_line_is_longer_and_no_word_is_broken(width: int) -> None:
    """At every width all words of all cells are there, each within one line."""
    lines = _lines(width)
    words = {word for line in lines for word in line.split()}
    assert max(map(len, lines)) <= max(width, len("modules    SmolLM2-135M-Instruct"))
    assert {word for row in ROWS for cell in row for word in cell.split() if cell != "-"} <= words


def test_a_table_that_fits_has_a_line_for_each_row() -> None:
    """A table with enough room has a line of headers, a rule, and the rows."""
    assert len(_lines(80)) == 2 + len(ROWS)


def test_cells_go_on_between_words_before_rows_become_blocks() -> None:
    """The column with several words gives way first; then each row is a block of what it says."""
    wrapped, blocks = _lines(43), _lines(42)
    assert sum("bård" in line or "mlp" in line for line in wrapped) == 2
    assert "model      bård" in blocks
    assert [line for line in blocks if line.startswith("modules")] == [
        "modules    attn q k v dense, mlp gate",
    ]


def test_columns_that_can_be_spared_go_first() -> None:
    """Only as many as it takes for a row to be a line, in the order that is given; all others stay."""
    spare = ("first, ms", "modules")
    assert fitting_columns(HEADERS, ROWS, spare, 62) == ([0, 1, 2], [])
    assert fitting_columns(HEADERS, ROWS, spare, 61) == ([0, 1], ["first, ms"])
    assert fitting_columns(HEADERS, ROWS, spare, 30) == ([0], ["first, ms", "modules"])
    assert fitting_columns(HEADERS, ROWS, spare, 2) == ([0], ["first, ms", "modules"])
