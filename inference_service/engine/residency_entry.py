"""What residency knows of one adapter, and what it counts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Generic

from inference_service.core.sequence import Adapter
from inference_service.engine.residents import P, Standing, State
from loramux_shared.faults import Fault

LOAD_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
"""Of the histogram of loads."""


@dataclass
class ResidencyStats:
    """Counters."""

    loads: int = 0
    """Adapters that became resident."""
    loads_by_tier: Counter[str] = field(default_factory=Counter)
    """Adapters that came to the host's memory, by where they were."""
    failures: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    """From the beginning of loads to residency, all together."""
    load_counts: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BUCKETS_S) + 1))
    """Loads by how long they took: up to each of `LOAD_BUCKETS_S`, above the one before; then longer."""
    waits: int = 0
    """Sequences whose adapter was not resident when they came."""

    def loaded(self, seconds: float) -> None:
        """Count a load."""
        self.loads += 1
        self.load_seconds += seconds
        self.load_counts[bisect_left(LOAD_BUCKETS_S, seconds)] += 1


@dataclass(eq=False)
class Entry(Generic[P]):
    """An adapter that is resident, wanted, pinned, or failed lately."""

    adapter: Adapter
    state: State = State.ABSENT
    packed: P | None = None
    num_bytes: int = 0
    offset: int = 0
    slot: int = -1
    """From the moment that it has a place; `Adapter.slot` is set when it is resident."""
    starved: bool = False
    refs: int = 0
    reading: int = 0
    """Of the references that were released, those that submitted steps may still need."""
    waiters: int = 0
    pinned: bool = False
    prefetched: bool = False
    """Wanted as long as there is room that nobody else needs."""
    used: int = 0
    """A number that grows with every use of any adapter."""
    used_s: float | None = None
    began_s: float = 0.0
    fault: Fault | None = None
    pause_s: float = 0.0
    retry_s: float = -math.inf

    @property
    def held_fast(self) -> bool:
        """Whether it must stay where it is."""
        return bool(self.refs or self.reading or self.pinned) or self.state is not State.RESIDENT


def standing_of(entry: Entry[P]) -> Standing:
    """Return what an operator may know of an adapter."""
    return Standing(
        entry.adapter,
        entry.state,
        entry.num_bytes,
        entry.refs,
        entry.waiters,
        entry.pinned,
        entry.used_s,
        entry.adapter.unusable or entry.fault,
    )
