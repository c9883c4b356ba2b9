"""The replica that a client asks: one of several, and another where that does not answer; no gRPC in here."""

import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence


class Placement:
    """The replicas of a client, and how many streams each has; safe for threads.

    A client begins with one of the replicas, drawn once, and stays there. Those that failed lately come last.
    """

    def __init__(
        self,
        replicas: Iterable[str] = (),
        spot: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin; spot, from 0 to below 1, is where among the replicas."""
        self._spot = random.random() if spot is None else spot  # noqa: S311 - spreads clients, guards nothing
        self._clock = clock
        self._lock = threading.Lock()
        self._replicas = tuple(replicas)
        self._open = dict.fromkeys(self._replicas, 0)
        self._down: dict[str, float] = {}
        """When those that failed may be asked again."""

    def replace(self, replicas: Sequence[str]) -> None:
        """Take streams to these from now on; those that others have continue."""
        with self._lock:
            if self._replicas == tuple(replicas):
                return
            self._replicas = tuple(replicas)
            busy = {each: count for each, count in self._open.items() if count}
            self._open = dict.fromkeys(self._replicas, 0) | busy
            self._down = {each: until for each, until in self._down.items() if each in self._open}

    def is_gone(self, replica: str) -> bool:
        """Return True if a replica has left the fleet, and has no streams."""
        with self._lock:
            return replica not in self._open

    def take(self, tried: Collection[str] = ()) -> str | None:
        """Return the replica of a new stream, none of those that were tried; None when there is no other."""
        with self._lock:
            now, begin = self._clock(), int(self._spot * len(self._replicas))
            others = [each for each in self._replicas[begin:] + self._replicas[:begin] if each not in tried]
            well = (each for each in others if self._down.get(each, now) <= now)
            replica = next(well, others[0] if others else None)
            if replica is not None:
                self._open[replica] += 1
            return replica

    def give(self, replica: str) -> None:
        """Note the end of a stream."""
        with self._lock:
            self._open[replica] -= 1
            if not self._open[replica] and replica not in self._replicas:
                del self._open[replica]

    def failed(self, replica: str, pause_s: float) -> None:
        """Ask others first for so long."""
        with self._lock:
            if replica in self._open:
                self._down[replica] = self._clock() + pause_s
