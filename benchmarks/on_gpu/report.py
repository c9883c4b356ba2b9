"""The results, as one table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from benchmarks.on_gpu.targets import Figure, Row, Verdict, judge


@dataclass(frozen=True)
class Report:
    """A whole run."""

    machine: Mapping[str, str]
    rows: Sequence[Row]
    notes: Sequence[str]
    """Omissions and their reasons; remarks of the device."""

    @property
    def verdicts(self) -> list[Verdict]:
        """Every target, met or missed."""
        return judge(self.rows)

    def text(self) -> str:
        """The machine, a block per section, and the targets."""
        width = max(map(len, self.machine), default=0)
        blocks = [[f"{name:<{width}}  {value}" for name, value in self.machine.items()]]
        for section, rows in groupby(self.rows, key=lambda row: row.section):
            blocks.append([section, *lines(list(rows))])
        if self.notes:
            blocks.append(["notes", *(f"  {note}" for note in self.notes)])
        blocks.append(["targets on an H100", *(f"  {verdict}" for verdict in self.verdicts)])
        return "\n\n".join("\n".join(block) for block in blocks)

    def as_json(self) -> str:
        """The same for programs; what a rehearsal does not time is null."""
        rows = [{"section": row.section, **row.point, **_without_nan(row.figures)} for row in self.rows]
        targets = [
            {"target": each.text, "met": each.met, "worst": each.worst, "at": each.at} for each in self.verdicts
        ]
        whole = {"machine": dict(self.machine), "rows": rows, "notes": list(self.notes), "targets": targets}
        return json.dumps(whole, indent=1, allow_nan=False)


def lines(rows: Sequence[Row]) -> list[str]:
    """Rows below the names of their columns, aligned."""
    cells = [[*rows[0].point, *rows[0].figures]]
    cells += [[*map(str, row.point.values()), *map(formatted, row.figures.values())] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells
    ]


def formatted(value: Figure) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if math.isnan(value):
        return "rehearsal"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def _without_nan(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    return {name: None if _is_nan(value) else value for name, value in figures.items()}


def _is_nan(value: Figure) -> bool:
    return isinstance(value, float) and math.isnan(value)
