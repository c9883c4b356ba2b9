"""Charts as inline SVG: axes, lines, dots and ranges; colours are classes of the page."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 40
MAX_TICKS = 6
MAX_POINTS = 1500
"""Points of a line or a cloud; of more, every second or third is drawn."""
LOG_SPAN = 30.0
"""Ratio of the ends beyond which an axis is logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A range of values with round ticks."""

    low: float
    high: float
    title: str = ""
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], title: str, *, may_log: bool = False) -> "Axis":
        """Return an axis with room for values; from 0, or logarithmic where that shows more."""
        high = max(values, default=1.0) or 1.0
        low = min((value for value in values if value > 0), default=high)
        if may_log and high / low > LOG_SPAN:
            return cls(low / 1.2, high * 1.2, title, log=True)
        return cls(0.0, high * 1.04, title)

    def place(self, value: float) -> float:
        """Return where a value is, as a part of the length."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values within."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
            inside = [value for value in found if self.low <= value <= self.high]
            return inside if len(inside) <= MAX_TICKS else inside[:: math.ceil(len(inside) / MAX_TICKS)]
        rough = (self.high - self.low) / MAX_TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Chart:
    """The frame of a chart; its methods return marks."""

    x: Axis
    y: Axis
    width: int = 560
    height: int = 280
    left: int = LEFT

    def line(self, points: Sequence[Point], kind: str, title: str = "") -> str:
        """Return a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, thin(points)))
        return f'<polyline class="{kind}" points="{path}"><title>{escape(title)}</title></polyline>'

    def dots(self, points: Sequence[Point], kind: str, radius: float = 3.2) -> str:
        """Return a cloud of points."""
        places = map(self.at, thin(points))
        return "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in places)

    def at(self, point: Point) -> Point:
        """Return the place of a point in the drawing."""
        width, height = self.width - self.left - RIGHT, self.height - TOP - BOTTOM
        return self.left + width * self.x.place(point[0]), TOP + height * (1 - self.y.place(point[1]))

    def draw(self, marks: Iterable[str], label: str, rows: Sequence[str] = ()) -> str:
        """Return the chart with its marks; rows are names that the y axis has instead of numbers."""
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = [f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">']
        for value in self.x.ticks():
            x = round(self.at((value, self.y.low))[0], 1)
            parts.append(f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}"/>')
            parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{_round(value)}</text>')
        names = enumerate(rows) if rows else ((value, _round(value)) for value in self.y.ticks())
        for value, name in names:
            y = round(self.at((self.x.low, value))[1], 1)
            parts.append(f'<line class="grid" x1="{self.left}" y1="{y}" x2="{right}" y2="{y}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        middle = (self.left + right) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{self.x.title}</text>')
        return "".join([*parts, *marks, "</svg>"])


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """Return so many points that a page stays small, the last one among them."""
    step = math.ceil(len(points) / MAX_POINTS)
    return points if step <= 1 else [*points[::step], points[-1]]


def distribution(values: Sequence[float]) -> list[Point]:
    """Return the steps of a cumulative distribution: values, and the percentage that is not above."""
    ordered = sorted(values)
    steps: list[Point] = [(ordered[0], 0.0)] if ordered else []
    for index, value in enumerate(ordered):
        steps += [(value, 100 * index / len(ordered)), (value, 100 * (index + 1) / len(ordered))]
    return steps


def _round(value: float) -> str:
    return f"{value:,.10g}" if value >= 1000 else f"{value:.4g}"
