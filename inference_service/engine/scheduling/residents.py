"""The interfaces of the engine, its residency, and those that carry out its decisions."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from inference_service.core.adapter import Adapter
from inference_service.engine.scheduling.queues import Rank
from loramux_shared.faults import Fault

if TYPE_CHECKING:  # which would import torch
    from inference_service.engine.lora.packed import PackedAdapter

LOAD_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
"""Bounds of the histogram of loads."""


class Presence(Enum):
    """The place of an adapter, as the scheduler sees it."""

    ABSENT = "absent"
    """Sequences that wait for it wait for its load."""
    STARVED = "starved"
    """It is here, and without a place until others leave theirs."""
    RESIDENT = "resident"


class AdapterState(Enum):
    """The state of an adapter, as an operator sees it."""

    ABSENT = "absent"
    LOADING = "loading"
    HELD = "held"
    COPYING = "copying"
    RESIDENT = "resident"


class BankMemory(Protocol):
    """The memory that steps read adapters from."""

    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Write an adapter to unused bytes; on any thread."""
        ...

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Let a slot stand for what lies at an offset, from the next step on."""
        ...

    def leave(self, slot: int) -> None:
        """Let a slot stand for nothing."""
        ...


class Loader(Protocol):
    """Works on threads of its own, on which it also says what came of it, once."""

    def load(self, adapter: Adapter, done: Callable[[PackedAdapter | Fault, str], None]) -> None:
        """Begin to bring an adapter to the host's memory, verified and packed.

        done is called with that and the tier where it was found, or with a fault and an empty text.
        """
        ...

    def run(self, work: Callable[[], None], done: Callable[[Fault | None], None]) -> None:
        """Begin to do something else."""
        ...


class Residents:
    """The residency of adapters, as engine and scheduler ask it: here of those that keep their slots."""

    changes = 0
    """A number that grows whenever an adapter is wanted, arrives, leaves, fails, or may leave for another."""

    def __init__(self) -> None:
        self.failures: deque[tuple[tuple[Adapter, ...], Fault]] = deque()
        """An adapter whose load failed, or several that find no place together, until the engine has ended
        those who wait for them."""

    @property
    def retry_s(self) -> float:
        """When a load that failed is to be tried again, on the clock of ``time.monotonic``; infinite: never."""
        return math.inf

    @property
    def wanting(self) -> bool:
        """Return True if `bring_in` has anything to do."""
        return False

    @property
    def releasing(self) -> bool:
        """Return True if an adapter that no sequence is under way on may still be read by a step."""
        return False

    def resident(self) -> list[Adapter]:
        """Return the adapters that the bank holds."""
        return []

    def presence(self, adapter: Adapter) -> Presence:
        """Say where an adapter is."""
        return Presence.ABSENT if adapter.slot is None else Presence.RESIDENT

    def refusal(self, adapter: Adapter) -> Fault | None:  # noqa: ARG002 - none is refused
        """Return why an adapter's last load failed, until it may be retried."""
        return None

    def want(self, adapter: Adapter, key_id: str = "") -> None:
        """Note that one more sequence, of an API key, waits for an adapter."""

    def unwant(self, adapter: Adapter, key_id: str = "") -> None:
        """Note that a sequence stopped waiting for it."""

    def acquire(self, adapter: Adapter) -> None:
        """Note that a sequence is under way on a resident adapter, which stays until it is released."""

    def release(self, adapter: Adapter) -> None:
        """Note that the sequence is not any more; steps that were submitted may read the adapter still."""

    def submitted(self) -> None:
        """Note that a step was submitted."""

    def resolved(self, *, everything: bool = False) -> None:
        """Note that the oldest step that was submitted is over, or all are."""

    def bring_in(self, ranks: Mapping[Adapter, Rank], together: Iterable[tuple[Adapter, ...]] = ()) -> None:
        """Begin loads and give places, in the order of those who wait; who is together is wanted so."""


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
    """Seconds from the beginning of loads to residency, all together."""
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
class Standing:
    """An adapter that is resident, wanted, pinned, or failed lately; other threads may read it."""

    adapter: Adapter
    state: AdapterState = AdapterState.ABSENT
    num_bytes: int = 0
    """Bytes of the bank; 0 where it was never loaded."""
    in_flight: int = 0
    """Sequences under way on it."""
    waiting: int = 0
    """Sequences that wait for it or for a seat."""
    keys: Counter[str] = field(default_factory=Counter)
    """The same, by the API keys of their requests."""
    key_id: str = ""
    """API key whose share it takes on its way."""
    pinned: bool = False
    last_used_s: float | None = None
    """On the clock of ``time.monotonic``."""
    offset: int = 0
    slot: int = -1
    """Slot from the moment that it has a place; `Adapter.slot` is set when it is resident."""
    starved: bool = False
    reading: int = 0
    """Released references that submitted steps may still need."""
    prefetched: bool = False
    """Wanted as long as there is room that nobody else needs."""
    used: int = 0
    """A number that grows with every use of any adapter."""
    began_s: float = 0.0
    fault: Fault | None = None
    pause_s: float = 0.0
    retry_s: float = -math.inf

    @property
    def failure(self) -> Fault | None:
        """Return why it is no longer served, or why its last load failed."""
        return self.adapter.unusable or self.fault

    @property
    def held_fast(self) -> bool:
        """Return True if it must stay in its place."""
        return bool(self.in_flight or self.reading or self.pinned) or self.state is not AdapterState.RESIDENT
