"""Counters and histograms of models, of those that were used lately."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from inference_service.serving.telemetry.text_format import bounds_of, head, histogram, label

MOST: Final = 100
"""Models that have series: with some 66 each, a scrape stays below 1 MB."""
LATELY_S: Final = 3600.0
"""A model that was not used for so long has none."""


@dataclass(frozen=True)
class Counted:
    """A family of counters."""

    name: str
    """Without ``_total``."""
    text: str
    label: str = ""
    """Beside the model, if there is one."""


@dataclass(frozen=True)
class Timed:
    """A family of histograms of seconds."""

    name: str
    text: str
    buckets: tuple[float, ...]


@dataclass
class _Times:
    counts: list[int]
    total: float = 0.0


@dataclass
class _Model:
    used_s: float
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    times: dict[str, _Times] = field(default_factory=dict)

    def copy(self) -> _Model:
        times = {name: _Times(list(each.counts), each.total) for name, each in self.times.items()}
        return _Model(self.used_s, dict(self.counts), times)


class ModelSeries:
    """Counts on the event loop, and writes on any thread.

    A model that was not used for an hour, or that is not among the MOST used last, loses its series; when it is
    used again they begin at 0, which Prometheus takes for a counter that was reset, as after a restart.
    """

    def __init__(
        self,
        counters: Sequence[Counted],
        histograms: Sequence[Timed],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = tuple(counters)
        self._histograms = {each.name: each for each in histograms}
        self._clock = clock
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, name: str, model: str, amount: int = 1, said: str = "") -> None:
        """Add to a counter; said is the value of its own label."""
        with self._lock:
            counts = self._used(model).counts
            counts[name, said] = counts.get((name, said), 0) + amount

    def observe(self, name: str, model: str, seconds: float) -> None:
        """Add to a histogram."""
        buckets = self._histograms[name].buckets
        with self._lock:
            times = self._used(model).times
            if name not in times:
                times[name] = _Times([0] * (len(buckets) + 1))
            times[name].counts[bisect_left(buckets, seconds)] += 1
            times[name].total += seconds

    def render(self) -> str:
        """Return everything that is kept, as Prometheus reads it."""
        with self._lock:
            oldest_s = self._clock() - LATELY_S
            for model in [name for name, each in self._models.items() if each.used_s < oldest_s]:
                del self._models[model]
            models = {label(name): each.copy() for name, each in self._models.items()}
        return "".join((*self._counter_lines(models), *self._histogram_lines(models)))

    def _used(self, model: str) -> _Model:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = _Model(0.0)
            if len(self._models) > MOST:
                self._models.popitem(last=False)
        self._models.move_to_end(model)
        found.used_s = self._clock()
        return found

    def _counter_lines(self, models: Mapping[str, _Model]) -> Iterator[str]:
        for family in self._counters:
            yield head(f"{family.name}_total", "counter", family.text)
            for model, each in models.items():
                for (name, said), value in each.counts.items():
                    if name == family.name:
                        more = f',{family.label}="{label(said)}"' if family.label else ""
                        yield f'{name}_total{{model="{model}"{more}}} {value}\n'

    def _histogram_lines(self, models: Mapping[str, _Model]) -> Iterator[str]:
        for family in self._histograms.values():
            yield head(family.name, "histogram", family.text)
            bounds = bounds_of(family.buckets)
            for model, each in models.items():
                if (times := each.times.get(family.name)) is not None:
                    yield histogram(family.name, model, bounds, times.counts, times.total)
