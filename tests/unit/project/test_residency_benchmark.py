"""The report of ``benchmarks/residency.py``."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import residency
from benchmarks.moving.figures import Figure, percentile, ratio
from benchmarks.moving.forge import Forge


@pytest.mark.parametrize(
    ("found", "bar", "met"), [(1.0, 1.5, True), (1.5, 1.5, True), (1.6, 1.5, False), (9.0, None, True)]
)
def test_a_bar_is_met_up_to_itself(found: float, bar: float | None, met: bool) -> None:
    """Every figure without a bar is met."""
    assert Figure("f", found, "x", bar).met is met


def test_what_is_no_number_meets_no_bar() -> None:
    """A section that could not measure has not passed."""
    assert not Figure("f", math.nan, "x", 1.0).met


def test_a_ratio_is_of_pairs() -> None:
    """A moment in which everything takes ten times as long changes nothing."""
    assert ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_percentile_is_one_of_the_values() -> None:
    """Also the last one, of few."""
    assert percentile(range(100), 0.99) == 99
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


async def test_a_missed_bar_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missed bar is reported by line and, all sections together, by the return value."""

    async def section(forge: Forge, rounds: int) -> list[Figure]:
        return [Figure("good", 1.0, "x", 2.0), Figure("bad", 3.0, "x", 2.0)]

    monkeypatch.setattr(residency, "SECTIONS", {"own": section})
    forge = Forge.__new__(Forge)  # nobody looks at it
    assert not await residency.measure(["own"], forge, 1, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "MISSED" in line] == ["bad"]
    assert not await residency.measure(["own"], forge, 1, as_json=True)
    output = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["section"], each["name"], each["met"]) for each in output] == [
        ("own", "good", True), ("own", "bad", False),
    ]  # fmt: skip


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown section is refused by name, with the known ones, before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        residency.main(["churn", "trun"])
    assert ended.value.code == 2
    assert "no section trun; there are turns, churn" in capsys.readouterr().err
