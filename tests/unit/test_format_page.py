"""The page of the format and the records of the code name the same fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loramux_shared.bundle.manifest import BaseRecord, Current, Generation, Manifest, Row
from loramux_shared.deployment import Model, Repository

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bundle-format.md").read_text(encoding="utf-8")


def section(begin: str, end: str) -> str:
    """What stands between two pieces of text of the page."""
    return PAGE[PAGE.index(begin) : PAGE.index(end, PAGE.index(begin))]


def first_column(table: str) -> set[str]:
    """The names in the first column of a table, of which a cell may hold several."""
    rows = re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE)
    return {name for row in rows for name in row.split(", ")} - {"key"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (Manifest, first_column(section("### `manifest.json`", "A manifest MUST hold"))),
        (Row, first_column(section("A row:", "**Coverage.**"))),
        (
            Generation,
            set(re.findall(r"`(\w+)`", section("`generations/<n>.json`:", "A `source` is"))),
        ),
        (Current, set(re.findall(r"`(\w+)`", section("`current.json`:", "## The npy files")))),
        (BaseRecord, set(re.findall(r"`base` \(`{(\w+), (\w+)}`\)", PAGE)[0])),
        (Repository, set(re.findall(r"A `source` is `{([^}]*)}`", PAGE)[0].split(", "))),
    ],
)
def test_a_record_has_the_keys_that_the_page_names(record: type[Model], told: set[str]) -> None:
    """A key that is written and not told, or told and not written, is a mistake of one of the two."""
    values = {"auto", "always", "never"}  # of merge
    assert told - values == set(record.model_fields)
