"""Operators' views of adapters and of the replica. Plain and frozen, no protobuf and no JSON."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from inference_service.core.computing import UNKNOWN, Computing
from inference_service.engine.residents import AdapterState
from loramux_shared.faults import Fault


class AdapterPlace(StrEnum):
    """The place of an adapter's matrices, of those places that the engine knows."""

    STORE = "store"
    """Not in memory: the first request waits until they come from the replica's disk or from the store."""
    HOST = "host"
    """On their way into the bank, in the host's memory."""
    DEVICE = "device"
    """The adapter is in the bank or, where it is merged, in the weights."""


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
    """Generation of the deployment, as this replica serves it."""
    place: AdapterPlace
    state: AdapterState
    pinned: bool
    only_here: bool
    """True where it was loaded into this replica alone, and no generation has it."""
    kinds: tuple[str, ...]
    """Kinds of the adapter; empty while they are not known."""
    in_flight: int = 0
    """Sequences under way on the version."""
    waiting: int = 0
    """Sequences that wait for it or for a seat."""
    num_bytes: int = 0
    """Bytes of the bank; 0 where it was never loaded."""
    last_used: datetime | None = None
    failure: Fault | None = None
    """Why it is no longer served, or why its last load failed."""


@dataclass(frozen=True)
class AdapterPage:
    """Some of the names, in their order."""

    adapters: tuple[AdapterView, ...]
    next_page: str
    """Token of the next page; empty at the end."""


@dataclass(frozen=True)
class ReplicaView:
    """A replica."""

    deployment: str
    generation: int
    """Served."""
    newest_generation: int
    """Newest generation that the replica saw."""
    state: str
    """Relation to its deployment: fixed, current, stale or blind."""
    reason: str
    """Why it is stale or blind."""
    paused: bool
    bank_bytes: int
    bank_bytes_used: int
    registered: int
    """Adapters by name."""
    resident: int
    """Digests in the bank."""
    arriving: int
    """Digests on their way into the bank."""
    pinned: int
    """Names."""
    loads: int
    failures: int
    evictions: int
    started: datetime
    version: str
    """Version of loramux."""

    @property
    def standing(self) -> tuple[object, ...]:
        """Return the values whose change a watcher is notified of; uses of adapters change much more often."""
        counts = (self.registered, self.pinned, self.loads, self.failures, self.evictions)
        return (self.generation, self.newest_generation, self.state, self.reason, self.paused, *counts)


@dataclass(frozen=True)
class Loaded:
    """An adapter that was loaded."""

    adapter: AdapterView
    everywhere: bool
    """True where a generation has it, so that every replica of the deployment will; False: this one alone."""


@dataclass(frozen=True)
class Facts:
    """The facts that do not change while a replica lives."""

    deployment: str
    started: datetime
    dtype: str = ""
    """Type of computation, as torch names it."""
    max_lora_rank: int = 0
    load_s: float = 0.0
    """Seconds from the start of loading until everything was ready."""
    computing: Computing = UNKNOWN
    """The operations that compute."""
    ranks: int = 1
    """Processes that compute the base together."""
