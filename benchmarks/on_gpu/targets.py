"""Targets on an H100, and whether the results meet them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

OF_BASE: Final = "of base"
"""Throughput, as a part of that of an engine without adapters."""
OF_FLOOR: Final = "of floor"
"""Time, as a multiple of what the bytes alone take."""
FLOOR: Final = "floor us"
BYTES_DOMINATE_US: Final = 10.0
"""Floor from which on it is longer than the fixed cost of two launches, about 5 us."""


Figure = float | int | str | None
"""NaN: a rehearsal, in which nothing is timed; None: does not apply."""


@dataclass(frozen=True)
class Row:
    """One point of a section; rows of a section have the same columns."""

    section: str
    point: Mapping[str, int | str]
    """Parameters of the measurement."""
    figures: Mapping[str, Figure]
    """Results; the unit is in the name."""


@dataclass(frozen=True)
class Target:
    """A bound on one figure of some rows."""

    text: str
    section: str
    figure: str
    least: float | None = None
    most: float | None = None
    applies: Callable[[Row], bool] = lambda _: True

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """The worst row decides."""
        found = [(value, row) for row in rows if (value := self._value(row)) is not None]
        if not found:
            return Verdict(self.text, None, None, "")
        sign = 1 if self.least is not None else -1
        worst, row = min(found, key=lambda each: sign * each[0])
        met = worst >= self.least if self.least is not None else self.most is None or worst <= self.most
        return Verdict(self.text, met, worst, ", ".join(f"{name} {value}" for name, value in row.point.items()))

    def _value(self, row: Row) -> float | None:
        if row.section != self.section or not self.applies(row):
            return None
        value = row.figures.get(self.figure)
        return value if isinstance(value, float) and not math.isnan(value) else None


@dataclass(frozen=True)
class Verdict:
    """A target and what became of it."""

    text: str
    met: bool | None
    """None: nothing that it speaks of was measured."""
    worst: float | None
    at: str
    """The point of the worst figure."""

    def __str__(self) -> str:
        if self.met is None:
            return f"not measured  {self.text}"
        return f"{'met' if self.met else 'MISSED':<12}  {self.text}: {self.worst:.3f} at {self.at}"


def _adapters(low: int, high: int) -> Callable[[Row], bool]:
    def applies(row: Row) -> bool:
        return isinstance(row.point["active"], int) and low <= row.point["active"] <= high

    return applies


def _is_base_only(row: Row) -> bool:
    return row.point["active"] == 0 and row.point["loaded"] != 0


def _is_bytes(row: Row) -> bool:
    floor = row.figures.get(FLOOR)
    return isinstance(floor, float) and floor >= BYTES_DOMINATE_US


TARGETS: Final = (
    Target(
        "step, 1-8 adapters: at least 0.95 of base throughput", "step", OF_BASE, 0.95, None, _adapters(1, 8)
    ),
    Target("step, 16 adapters: at least 0.90", "step", OF_BASE, 0.90, None, _adapters(9, 16)),
    Target("step, base rows beside loaded adapters: within 1 %", "step", OF_BASE, 0.99, None, _is_base_only),
    Target("serving, 1-8 adapters: at least 0.95", "serving", OF_BASE, 0.95, None, _adapters(1, 8)),
    Target("serving, 16 adapters: at least 0.90", "serving", OF_BASE, 0.90, None, _adapters(9, 16)),
    Target("sgmv: within 1.5 times a floor of 10 us or more", "sgmv", OF_FLOOR, None, 1.5, _is_bytes),
    Target("delta: within 2 times a floor of 10 us or more", "delta", OF_FLOOR, None, 2.0, _is_bytes),
)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """All targets."""
    return [target.judge(rows) for target in TARGETS]
