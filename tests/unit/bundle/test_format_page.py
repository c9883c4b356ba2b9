"""The page of the format and the records of the code name the same fields."""

import re

import pytest

from loramux_shared.bundle.added_tokens import AddedToken, OwnTokens
from loramux_shared.bundle.generation import AdapterRecord, BaseRecord, Current, Descent, Generation, Recipe
from loramux_shared.bundle.manifest import (
    AdapterSummary,
    Coverage,
    FileDigest,
    Manifest,
    ModuleRow,
    Replaced,
    ScoreHead,
    Truncation,
)
from loramux_shared.bundle.proof import Effect, Probe, ProbeLogprob, Proof
from loramux_shared.deployment import Model, ModelLimits, Repository, Resolve
from loramux_shared.faults import Finding
from loramux_shared.runtime import Limits
from tests.support.root import ROOT

PAGE = (ROOT / "docs" / "reference" / "bundle-format.md").read_text(encoding="utf-8")


def section(begin: str, end: str) -> str:
    return PAGE[PAGE.index(begin) : PAGE.index(end, PAGE.index(begin))]


def first_column(table: str) -> set[str]:
    """The names in the first column of a table, of which a cell may hold several."""
    rows = re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE)
    return {name for row in rows for name in row.split(", ")} - {"key"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (Manifest, first_column(section("### `manifest.json`", "A manifest MUST hold"))),
        (ModuleRow, first_column(section("A row:", "**Coverage.**"))),
        (Generation, set(re.findall(r"`(\w+)`", section("`generations/<n>.json`:", "A `source` is")))),
        (Current, set(re.findall(r"`(\w+)`", section("`current.json`:", "## The npy files")))),
        (BaseRecord, set(re.findall(r"`base` \(`{([^}]*)}`\)", PAGE)[0].split(", "))),
        (Repository, set(re.findall(r"A `source` is `{([^}]*)}`", PAGE)[0].split(", "))),
    ],
)
def test_a_record_has_the_keys_that_the_page_names(record: type[Model], expected: set[str]) -> None:
    """A key that is written and not told, or told and not written, is a mistake of one of the two."""
    values = {"auto", "always", "never"}  # of merge
    assert expected - values == set(record.model_fields)


INSIDE = (
    AddedToken, AdapterRecord, AdapterSummary, BaseRecord, Coverage, Descent, Effect, FileDigest, Finding,
    Limits, ModelLimits, OwnTokens, Probe, Proof, Recipe, Replaced, Repository, ScoreHead, ProbeLogprob,
    Truncation, Resolve,
)  # fmt: skip


def test_the_records_inside_others_have_the_keys_that_the_page_names() -> None:
    """The page lists each nested record in braces, with all of its keys, and no other braces."""
    reported = {frozenset(keys.split(", ")) for keys in re.findall(r"`{(\w+(?:, \w+)+)}`", PAGE)}
    assert reported == {frozenset(record.model_fields) for record in INSIDE}


@pytest.mark.parametrize("record", [*INSIDE, Manifest, ModuleRow, Generation, Current])
def test_records_refuse_unknown_keys(record: type[Model]) -> None:
    assert record.model_config["extra"] == "forbid"
