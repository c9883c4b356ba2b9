"""Figures beside their bars."""

import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Figure:
    """One number."""

    name: str
    found: float
    unit: str
    bar: float | None = None
    """The largest value that meets it; None: there is no bar."""
    note: str = ""

    @property
    def met(self) -> bool:
        """Return True if it is at or below its bar; NaN never is."""
        return self.bar is None or self.found <= self.bar

    def __str__(self) -> str:
        bar = "" if self.bar is None else f"at most {self.bar:g}"
        state = "" if self.bar is None else "met" if self.met else "MISSED"
        return f"{self.name:<52}{self.found:>10.3g} {self.unit:<6}{bar:>14}  {state:<7}{self.note}"


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios of pairs: a busy moment hits both of a pair."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def percentile(values: Iterable[float], part: float) -> float:
    """Return the value that so large a part of the values is at most."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def formatted(values: Iterable[float], scale: float = 1.0, unit: str = "") -> str:
    """Return the results of several rounds, for the note of a figure."""
    return " ".join(f"{value * scale:.3g}" for value in values) + (f" {unit}" if unit else "")


def machine() -> str:
    """Describe the machine in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    versions = f"torch {torch.__version__.split('+')[0]}, Python {sys.version.split()[0]}"
    return f"{model}, {os.cpu_count()} cores; {versions}; load average {os.getloadavg()[0]:.1f}"
