"""The states of adapters and replicas, as operators see them: both APIs write them, and clients read them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from loramux_shared.faults import Fault

Tier = Literal["store", "host", "device"]
"""The place of an adapter's matrices, of those that the engine knows: not in memory, so that the first request
waits until they come from the disk or the store; on their way into the bank, in the host's memory; in the bank.
"""
Residency = Literal["absent", "loading", "held", "copying", "resident"]


@dataclass(frozen=True)
class AdapterStatus:
    """A registered adapter of a replica."""

    name: str
    digest: str
    """The version that the name stands for: requests from now on are answered by it."""
    resident_digest: str
    """The version of the name that is in the bank: the same, or while that is not there yet the one before;
    empty where there is none.
    """
    generation: int
    """Generation of the deployment, as this replica serves it."""
    tier: Tier
    residency: Residency
    pinned: bool
    in_flight: int
    """Sequences under way on the version."""
    waiting: int
    """Sequences that wait for it or for a seat."""
    num_bytes: int
    """Bytes of the bank; 0 where it was never loaded."""
    last_used: datetime | None
    last_failure: Fault | None
    """Why it is no longer served, or why its last load failed."""
    only_here: bool
    """True if it was loaded into this replica alone, and no generation has it."""
    kinds: tuple[str, ...] = ()
    """Kinds of the adapter, as in `ModelInfo`; empty while they are not known."""


@dataclass(frozen=True)
class ReplicaStatus:
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
    load_failures: int
    evictions: int
    start_time: datetime | None
    version: str
    """Version of loramux."""
