"""Figures beside their bars."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number."""

    name: str
    found: float
    unit: str
    bar: float | None = None
    """At most; None: told for its own sake."""
    note: str = ""

    @property
    def met(self) -> bool:
        """Return True if it is at or below its bar; NaN never is."""
        return self.bar is None or self.found <= self.bar

    def as_json(self, section: str) -> dict[str, Any]:
        """Return it as one object."""
        return {"section": section, **asdict(self), "met": self.met}

    def __str__(self) -> str:
        bar = "" if self.bar is None else f"at most {self.bar:g}"
        state = "" if self.bar is None else "met" if self.met else "MISSED"
        return f"{self.name:<52}{self.found:>10.3g} {self.unit:<6}{bar:>14}  {state:<7}{self.note}"


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of how many times as much one was, pair by pair: a busy moment hits both of a pair."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def percentile(values: Iterable[float], part: float) -> float:
    """Return the value that so large a part of them is at most."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def formatted(values: Iterable[float], scale: float = 1.0, unit: str = "") -> str:
    """Return what several rounds gave, for the note of a figure."""
    return " ".join(f"{value * scale:.3g}" for value in values) + (f" {unit}" if unit else "")


def memory_mb(pid: int | str = "self") -> float:
    """Return a process's resident memory that is not a file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) / 1e3
