"""A request on its way through a fleet: which replica it asks next, and when it gives up."""

import time
from typing import Final

from loramux.fleet.placement import Placement
from loramux_shared.faults import (
    Fault,
    QueueFull,
    ReplicaBehind,
    ServerUnavailable,
    SourceUnavailable,
    Status,
    StoreUnavailable,
)

TRIES: Final = 4
"""Replicas that may refuse a request, or keep it waiting for nothing; those that are known to be away are not
counted."""
QUICK_S: Final = 0.5
"""A refusal of an unreachable replica that came sooner does not count as a try."""
MOST_PAUSE_S: Final = 30.0
PASSING: Final = (ReplicaBehind, SourceUnavailable, StoreUnavailable)
"""Faults of one adapter or generation, after which the replica is well."""


class Trip:
    """Asks each replica once, for as long as nothing was answered.

    timeout_s bounds all of it. What is not repeated asks one replica alone.
    """

    def __init__(self, placement: Placement, timeout_s: float | None, *, repeat: bool) -> None:
        self._placement = placement
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s
        self._repeat = repeat
        self._tried: set[str] = set()
        self._spent = 0
        self._at = ""
        self._began = 0.0
        self._fault: Fault = ServerUnavailable("there are no replicas.")

    @property
    def left_s(self) -> float | None:
        """Return the rest of the request's time."""
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())

    def begin(self) -> str:
        """Return the replica to ask.

        Raises:
            Fault: what the last one said, when there is no other.
        """
        replica = self._placement.take(self._tried)
        if replica is None:
            raise self._fault
        self._at, self._began = replica, time.monotonic()
        self._tried.add(replica)
        return replica

    def end(self) -> None:
        """Leave the replica; doing that again does nothing."""
        if self._at:
            self._placement.give(self._at)
            self._at = ""

    def failed(self, fault: Fault, *, answered: bool = False) -> None:
        """Leave the replica after a fault, and return where another one may be asked.

        Raises:
            Fault: this one, where nobody else is to be asked; that is so once a part of the answer was given.
        """
        at, took_s = self._at, time.monotonic() - self._began
        self.end()
        if fault.status is not Status.UNAVAILABLE and not isinstance(fault, QueueFull):
            raise fault
        if not isinstance(fault, PASSING):
            self._placement.failed(at, min(fault.retry_after_s or 0.0, MOST_PAUSE_S))
        self._spent += took_s > QUICK_S or not isinstance(fault, ServerUnavailable)
        if answered or not self._repeat:
            raise fault
        tried = len(self._tried)
        self._fault = (
            fault
            if tried == 1
            else fault.with_message(f"none of {tried} replicas took it; the last: {fault.message}")
        )
        if self._spent >= TRIES:
            raise self._fault
