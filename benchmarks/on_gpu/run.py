"""The context of a section: the device, the scale, the deadline, and the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from benchmarks.on_gpu.device import Device, Machine
from benchmarks.on_gpu.report import formatted
from benchmarks.on_gpu.targets import Figure, Row

T = TypeVar("T")


class Scale(Enum):
    """The amount of measurements."""

    FULL = "full"
    QUICK = "quick"
    REHEARSAL = "rehearsal"


@dataclass
class Run:
    """One run of the sections; rows are reported as they come, for a run may be cut off."""

    machine: Machine
    scale: Scale
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _section: str = ""
    _ends_s: float = 0.0

    @property
    def device(self) -> Device:
        """Return the device of everything."""
        return self.machine.device

    @property
    def left_s(self) -> float:
        """Seconds until the section is out of time."""
        return self._ends_s - time.monotonic()

    def begin(self, section: str, seconds: float) -> None:
        """Begin a section, which may take so long."""
        self._section, self._ends_s = section, time.monotonic() + seconds
        self.say(f"up to {seconds:.0f} s")

    def choose(self, full: Sequence[T], quick: Sequence[T], rehearsal: Sequence[T]) -> Sequence[T]:
        """The points for this scale."""
        return {Scale.FULL: full, Scale.QUICK: quick, Scale.REHEARSAL: rehearsal}[self.scale]

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
        """Tell who waits."""
        sys.stderr.write(f"[{self._section}] {text}\n")
        sys.stderr.flush()
