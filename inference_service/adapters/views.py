"""What operators see of adapters and of the replica. Plain and frozen, no protobuf and no JSON."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from inference_service.engine.residents import AdapterState
from loramux_shared.faults import Fault


class AdapterPlace(StrEnum):
    """Where an adapter's matrices are, of those places that the engine knows."""

    STORE = "store"
    """Not in memory: the first request waits until they come from the replica's disk or from the store."""
    HOST = "host"
    """On their way into the bank, in the host's memory."""
    DEVICE = "device"
    """In the bank or, where an adapter is merged, in the weights: where they are computed with."""


PLACES = {
    AdapterState.ABSENT: AdapterPlace.STORE,
    AdapterState.LOADING: AdapterPlace.STORE,
    AdapterState.HELD: AdapterPlace.HOST,
    AdapterState.COPYING: AdapterPlace.HOST,
    AdapterState.RESIDENT: AdapterPlace.DEVICE,
}


@dataclass(frozen=True)
class AdapterView:
    """A registered name."""

    name: str
    digest: str
    """The version that the name stands for: requests from now on are answered by it."""
    resident_digest: str
    """The version of the name that is in the bank: the same, or while that is not there yet the one before;
    empty where there is none."""
    generation: int
    """Of the deployment, as this replica serves it."""
    place: AdapterPlace
    state: AdapterState
    pinned: bool
    in_flight: int
    """Sequences under way on the version."""
    waiting: int
    """Sequences that wait for it or for a seat."""
    num_bytes: int
    """Of the bank; 0 where it was never loaded."""
    last_used: datetime | None
    failure: Fault | None
    """Why it is served no more, or why its last load failed."""
    only_here: bool
    """True where it was loaded into this replica alone, and no generation has it."""
    kinds: tuple[str, ...]
    """What it is; none while that is not known."""


@dataclass(frozen=True)
class AdapterPage:
    """Some of the names, in their order."""

    adapters: tuple[AdapterView, ...]
    next_page: str
    """What asks for the next ones; empty at the end."""


@dataclass(frozen=True)
class ReplicaView:
    """A replica."""

    deployment: str
    generation: int
    """Served."""
    newest: int
    """The newest generation that was seen."""
    state: str
    """How it stands to its deployment: fixed, current, stale or blind."""
    reason: str
    """Why it is stale or blind."""
    paused: bool
    bank_bytes: int
    bank_used: int
    registered: int
    """Adapters by name."""
    resident: int
    """Of the digests, those in the bank."""
    arriving: int
    """Of the digests, those on their way into it."""
    pinned: int
    """Names."""
    loads: int
    failures: int
    evictions: int
    started: datetime
    version: str
    """Of loramux."""

    @property
    def standing(self) -> tuple[object, ...]:
        """What a watcher is told of when it changes; uses of adapters change much more often."""
        counts = (self.registered, self.pinned, self.loads, self.failures, self.evictions)
        return (self.generation, self.newest, self.state, self.reason, self.paused, *counts)


@dataclass(frozen=True)
class Loaded:
    """An adapter that was loaded."""

    adapter: AdapterView
    everywhere: bool
    """True where a generation has it, so that every replica of the deployment will; False: this one alone."""


@dataclass(frozen=True)
class Facts:
    """What does not change while a replica lives."""

    deployment: str
    started: datetime
    dtype: str = ""
    """Of computation, as torch names it."""
    max_lora_rank: int = 0
