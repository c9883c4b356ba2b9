"""Timing of work: recorded and replayed with a cold cache, or launched from Python."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.on_gpu.device import Device

REPLAYS: Final = 30
EAGER_ROUNDS: Final = 5
EAGER_CALLS: Final = 20
COPIES: Final = 8
"""Most works of one recording: so many times fewer does a measurement contain the start of a graph."""
COPY_BYTES: Final = 2**30
Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one work; NaN in a rehearsal."""

    median_us: float
    p10_us: float

    @classmethod
    def of(cls, values_us: Sequence[float]) -> Timing:
        """Return the timing of single measurements."""
        ranked = sorted(values_us)
        return cls(statistics.median(ranked), ranked[len(ranked) // 10])


def replayed(device: Device, works: Sequence[Work], replays: int = REPLAYS) -> Timing:
    """Record works of one kind, on memory of their own, as one graph; time replays, from a cold cache each."""

    def together() -> None:
        for work in works:
            work()

    graph = device.recorder().capture(together)
    marks = []
    for _ in range(1 if device.rehearses else replays):
        device.flush()
        begin = device.mark()
        graph.replay()
        marks.append((begin, device.mark()))
    device.wait()
    return Timing.of([device.between_us(begin, end) / len(works) for begin, end in marks])


def eager(device: Device, work: Work) -> Timing:
    """Time work as Python launches it, one after the other without waiting between; the cache is warm."""
    work()
    rounds, calls = (1, 1) if device.rehearses else (EAGER_ROUNDS, EAGER_CALLS)
    values = []
    for _ in range(rounds):
        device.wait()
        begin = device.now_s()
        for _ in range(calls):
            work()
        device.wait()
        values.append((device.now_s() - begin) * 1e6 / calls)
    return Timing.of(values)


def copies_of(device: Device, num_bytes: int) -> int:
    """Return how many works to record together, where each takes so many bytes of memory: about 1 GB in all."""
    return 2 if device.rehearses else max(1, min(COPIES, COPY_BYTES // max(1, num_bytes)))


def copy_gb_s(device: Device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    size = 2**12 if device.rehearses else COPY_BYTES
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device.where) for _ in range(2))
    timing = replayed(device, [lambda: target.copy_(source)])
    return 2 * size / timing.median_us / 1e3
