"""Counters and histograms of models, of those that were used lately."""

import threading
import time
from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

Lines = tuple[bytes, ...]
"""The samples of one model, family by family."""


def head(name: str, kind: str, text: str) -> bytes:
    """Return the lines above a family's samples; its text has neither a backslash nor a line break."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode()


def label(value: str) -> str:
    """Return a label's value as it is written."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def sample(name: str, labels: Mapping[str, str], value: float) -> bytes:
    """Return one line; labels in the order in which they are given."""
    inside = ",".join(f'{key}="{label(content)}"' for key, content in labels.items())
    return f"{name}{{{inside}}} {value}\n".encode()


def histogram(name: str, model: str, bounds: Sequence[str], counts: Sequence[int], total: float) -> bytes:
    """Return the samples of one histogram; bounds are those of `bounds_of`, and counts do not add up."""
    inside = f'model="{label(model)}"'
    before = f'{name}_bucket{{{inside},le="'
    lines, sum_of = [], 0
    for bound, count in zip(bounds, counts, strict=True):
        sum_of += count
        lines.append(f'{before}{bound}"}} {sum_of}\n')
    lines.append(f"{name}_count{{{inside}}} {sum_of}\n{name}_sum{{{inside}}} {total}\n")
    return "".join(lines).encode()


def bounds_of(buckets: Sequence[float]) -> tuple[str, ...]:
    """Return upper bounds as they are written, with the last one that has none."""
    return (*(str(float(each)) for each in buckets), "+Inf")


def families(heads: Sequence[bytes], models: Sequence[Lines]) -> Iterator[bytes]:
    """Yield families one after the other: the format wants the samples of each together."""
    for nth, above in enumerate(heads):
        yield above
        for lines in models:
            yield lines[nth]


MOST: Final = 1000
"""Models that have series of their own, some 66 each with 5 KB, unless a setting says otherwise."""
OTHERS: Final = "(others)"
"""Name of the rest of the models: no adapter can have this name."""
LATELY_S: Final = 3600.0
"""A model that was not used for so long has none."""


@dataclass(frozen=True)
class Counted:
    """A family of counters."""

    name: str
    """Name without ``_total``."""
    text: str
    label: str = ""
    """Label beside the model, if there is one."""


@dataclass(frozen=True)
class Timed:
    """A family of histograms of seconds."""

    name: str
    text: str
    buckets: tuple[float, ...]


@dataclass
class _Histogram:
    counts: list[int]
    total: float = 0.0


@dataclass
class _Model:
    used_s: float = 0.0
    counts: defaultdict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    times: dict[str, _Histogram] = field(default_factory=dict)
    changes: int = 0
    written: tuple[int, Lines] = (0, ())
    """Its lines, and how many changes are in them."""


class ModelSeries:
    """Counts on the event loop, and writes on any thread: of each model only what changed since it last did.

    A model that was not used for an hour loses its series; when it is used again they begin at 0, which
    Prometheus takes for a counter that was reset, as after a restart. A model for which there is no room is
    counted as one of OTHERS, so sums over models are right.
    """

    def __init__(
        self,
        counters: Sequence[Counted],
        histograms: Sequence[Timed],
        most: int = MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._counters = tuple(counters)
        self._histograms = {each.name: each for each in histograms}
        self._bounds = {each.name: bounds_of(each.buckets) for each in histograms}
        self._heads = (
            *(head(f"{each.name}_total", "counter", each.text) for each in counters),
            *(head(each.name, "histogram", each.text) for each in histograms),
        )
        self._clock = clock
        self._models: OrderedDict[str, _Model] = OrderedDict()
        """Used last is last."""
        self._lock = threading.Lock()

    def count(self, name: str, model: str, amount: int = 1, label: str = "") -> None:
        """Add to a counter; said is the value of its own label."""
        with self._lock:
            counts = self._used(model).counts[name]
            counts[label] = counts.get(label, 0) + amount

    def observe(self, name: str, model: str, seconds: float) -> None:
        """Add to a histogram."""
        buckets = self._histograms[name].buckets
        with self._lock:
            times = self._used(model).times
            if name not in times:
                times[name] = _Histogram([0] * (len(buckets) + 1))
            times[name].counts[bisect_left(buckets, seconds)] += 1
            times[name].total += seconds

    def parts(self) -> Iterator[bytes]:
        """Return everything that is kept, as Prometheus reads it."""
        with self._lock:
            self._drop_idle()
            models = list(self._models.items())
        return families(self._heads, [self._lines(name, model) for name, model in models])

    def _used(self, model: str) -> _Model:
        found = self._models.get(model)
        if found is None:
            self._drop_idle()
            if len(self._models) - (OTHERS in self._models) >= self._most:
                model = OTHERS
            found = self._models.setdefault(model, _Model())
        self._models.move_to_end(model)
        found.used_s = self._clock()
        found.changes += 1
        return found

    def _drop_idle(self) -> None:
        oldest_s = self._clock() - LATELY_S
        while self._models and next(iter(self._models.values())).used_s < oldest_s:
            self._models.popitem(last=False)

    def _lines(self, name: str, model: _Model) -> Lines:
        with self._lock:
            changes, lines = model.written
            if changes == model.changes:
                return lines
            changes = model.changes
            counts = {family: dict(each) for family, each in model.counts.items()}
            times = {family: _Histogram(list(each.counts), each.total) for family, each in model.times.items()}
        lines = (
            *(_counter(family, name, counts.get(family.name, {})) for family in self._counters),
            *(self._histogram(family, name, times.get(family)) for family in self._histograms),
        )
        model.written = changes, lines
        return lines

    def _histogram(self, family: str, model: str, times: _Histogram | None) -> bytes:
        return histogram(family, model, self._bounds[family], times.counts, times.total) if times else b""


def _counter(family: Counted, model: str, counts: Mapping[str, int]) -> bytes:
    name = f"{family.name}_total"
    if not family.label:
        return b"".join(sample(name, {"model": model}, value) for value in counts.values())
    return b"".join(
        sample(name, {"model": model, family.label: label_value}, value)
        for label_value, value in counts.items()
    )
