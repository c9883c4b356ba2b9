"""The context of a section, its rows, and the targets on an H100 that they are judged by."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, TypeVar

from benchmarks.on_gpu.device import Device

T = TypeVar("T")
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
    bound: float
    applies: Callable[[Row], bool]

    def verdict(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return whether the worst row meets it; None where nothing that it speaks of was measured."""
        found = [
            (float(value), ", ".join(f"{name} {each}" for name, each in row.point.items()))
            for row in rows
            if row.section == self.section and self.applies(row)
            if isinstance(value := row.figures.get(self.figure), float) and not math.isnan(value)
        ]
        low = self.figure == OF_FLOOR
        worst, at = (max if low else min)(found, default=(None, ""))
        met = None if worst is None else worst <= self.bound if low else worst >= self.bound
        return {"target": self.text, "met": met, "worst": worst, "at": at}


def _adapters(low: int, high: int) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.point["active"], int) and low <= row.point["active"] <= high


def _is_base_only(row: Row) -> bool:
    return row.point["active"] == 0 and row.point["loaded"] != 0


def _is_bytes(row: Row) -> bool:
    floor = row.figures.get(FLOOR)
    return isinstance(floor, float) and floor >= BYTES_DOMINATE_US


TARGETS: Final = (
    Target("step, 1-8 adapters: at least 0.95 of base throughput", "step", OF_BASE, 0.95, _adapters(1, 8)),
    Target("step, 16 adapters: at least 0.90", "step", OF_BASE, 0.90, _adapters(9, 16)),
    Target("step, base rows beside loaded adapters: within 1 %", "step", OF_BASE, 0.99, _is_base_only),
    Target("serving, 1-8 adapters: at least 0.95", "serving", OF_BASE, 0.95, _adapters(1, 8)),
    Target("serving, 16 adapters: at least 0.90", "serving", OF_BASE, 0.90, _adapters(9, 16)),
    Target("sgmv: within 1.5 times a floor of 10 us or more", "sgmv", OF_FLOOR, 1.5, _is_bytes),
)


@dataclass
class Run:
    """One run of the sections; rows are reported as they come, for a run may be cut off."""

    device: Device
    about: Mapping[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Omissions and their reasons; remarks of the device."""
    _section: str = ""
    _ends_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Seconds until the section is out of time."""
        return self._ends_s - time.monotonic()

    def begin(self, section: str, seconds: float) -> None:
        """Begin a section, which may take so long."""
        self._section, self._ends_s = section, time.monotonic() + seconds
        self.say(f"up to {seconds:.0f} s")

    def choose(self, full: T, rehearsal: T) -> T:
        """Return what is for this device."""
        return rehearsal if self.device.rehearses else full

    def each(self, points: Sequence[T], measure: Callable[[T], None]) -> None:
        """Measure points in turn while there is time; what is left out becomes a note."""
        for index, point in enumerate(points):
            if self.left_s <= 0:
                self.note(f"out of time before {point}; {len(points) - index} of {len(points)} points left out")
                return
            measure(point)

    def add(self, point: Mapping[str, int | str], figures: Mapping[str, Figure]) -> None:
        """Put down a row."""
        self.rows.append(Row(self._section, point, figures))
        self.say(" ".join(f"{name} {formatted(value)}" for name, value in {**point, **figures}.items()))

    def note(self, text: str) -> None:
        """Put down what belongs beside the table."""
        self.notes.append(f"{self._section}: {text}")
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line on standard error."""
        print(f"[{self._section}] {text}", file=sys.stderr, flush=True)

    def verdicts(self) -> list[dict[str, Any]]:
        """Return every target, met or missed."""
        return [target.verdict(self.rows) for target in TARGETS]

    def text(self) -> str:
        """Return the machine, a table for each section, and the targets of what was measured."""
        blocks = [[f"{name:<8}  {value}" for name, value in self.about.items()]]
        for section, rows in groupby(self.rows, key=lambda row: row.section):
            blocks.append([section, *lines(list(rows))])
        blocks.append(["notes", *(f"  {note}" for note in self.notes)])
        words = {None: "not measured", True: "met", False: "MISSED"}
        verdicts = [
            f"  {words[each['met']]:<12}  {each['target']}"
            + ("" if each["met"] is None else f": {each['worst']:.3f} at {each['at']}")
            for each in self.verdicts()
        ]
        return "\n\n".join("\n".join(block) for block in [*blocks, ["targets on an H100", *verdicts]])


def lines(rows: Sequence[Row]) -> list[str]:
    """Return rows below the names of their columns, aligned."""
    cells = [[*rows[0].point, *rows[0].figures]]
    cells += [[*map(str, row.point.values()), *map(formatted, row.figures.values())] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells
    ]


def formatted(value: Figure) -> str:
    """Return a number with three digits that count."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if math.isnan(value):
        return "rehearsal"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
