"""The choice of a replica for a stream.

Every model has an order of the replicas, by rendezvous hashing: the same in all processes, and a replica that
leaves moves its own models only. A stream goes to the first of the order that has room for it, as far as one
client can see:

- A popular model may go to the first ``k`` of its order: a client begins somewhere among them, always at the
  same place, and continues to the next as soon as that one has its share of the streams. So popular models fill
  what the others leave free, and find themselves resident there.
- No replica has many more streams than the mean: ``1.25 m + sqrt(1.25 m)``, which comes near to 1.25 where they
  are many, and does not send few streams away from where their adapters are.

Replicas that failed lately come last. There is no gRPC in here.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Final

BOUND: Final = 1.25
"""Times the mean of open streams."""
SHARE: Final = 0.8
"""Share of the mean load at which a replica's popular models go to others too."""
PIECES: Final = 2.0
"""Times log2 of the number of replicas: the more there are, the further the fullest is from the mean, and the
smaller are the pieces that popular models are divided into."""
MEMORY: Final = 10_000
"""Requests after which what is known of models counts for the half."""
FEW: Final = 1000
"""Requests before which nothing much is known of models."""
VARIETY: Final = 4
"""Models that a client asks for, per replica that one of them may be spread over.

A client with few models sees little of the others' load, and does better with all clients of a model in one
place.
"""
ORDERS: Final = 16_384
"""Models whose orders are kept."""


@lru_cache(ORDERS)
def order(model: str, replicas: tuple[str, ...]) -> tuple[str, ...]:
    """Return the replicas in the order of a model."""
    key = blake2b(model.encode(errors="surrogatepass"), digest_size=32).digest()
    return tuple(sorted(replicas, key=lambda each: (_weight(key, each), each)))


def _weight(key: bytes, replica: str) -> bytes:
    return blake2b(replica.encode(), key=key, digest_size=8).digest()


class Popularity:
    """One client's estimate of how popular models are."""

    def __init__(self, pieces: float = PIECES) -> None:
        self._pieces = pieces
        self._asked: dict[str, int] = {}
        self._total = 0

    def copies(self, model: str, replicas: int) -> int:
        """Count a request for a model, and return over how many replicas it may be spread."""
        requests = self._asked.get(model, 0)
        self._asked[model] = requests + 1
        self._total += 1
        if self._total >= MEMORY:
            self._asked = {each: count // 2 for each, count in self._asked.items() if count > 1}
            self._total //= 2
        part = requests / max(self._total, FEW)
        pieces = math.ceil(part * replicas * self._pieces * math.log2(replicas))
        return max(1, min(pieces, replicas, len(self._asked) // VARIETY))


def choose(ordered: Sequence[str], load: Callable[[str], int], total: int, copies: int, spot: float) -> str:
    """Return the first of a model's order that has room.

    load is how many streams a replica has, and total how many all of them have; copies is over how many of the
    first the model may be spread, and spot, from 0 to below 1, where this client begins among those.
    """
    mean = (total + 1) / len(ordered)
    share = math.ceil(SHARE * mean)
    begin = int(spot * copies)
    best = ordered[begin]
    if load(best) < share:
        return best
    if copies > 1:
        homes = (*ordered[begin:copies], *ordered[:begin])
        best = next((each for each in homes if load(each) < share), None) or min(homes, key=load)
    most = math.ceil(BOUND * mean + math.sqrt(BOUND * mean))
    if load(best) < most:
        return best
    return next((each for each in ordered if load(each) < most), None) or min(ordered, key=load)


class Placement:
    """The open streams of a client, by replica; safe for threads. spot is that of `choose`."""

    def __init__(
        self,
        replicas: Iterable[str] = (),
        spot: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spot = random.random() if spot is None else spot  # noqa: S311 - spreads clients, guards nothing
        self._clock = clock
        self._lock = threading.Lock()
        self._replicas = tuple(replicas)
        self._open = dict.fromkeys(self._replicas, 0)
        self._total = 0
        self._down: dict[str, float] = {}
        """When those that failed may be asked again."""
        self._popularity = Popularity()

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

    def take(self, model: str, tried: Collection[str] = ()) -> str | None:
        """Return the replica of a new stream, none of those that were tried; None when there is no other."""
        with self._lock:
            usable = self._usable(model, tried)
            if not usable:
                return None
            copies = self._popularity.copies(model, len(usable))
            replica = choose(usable, self._open.__getitem__, self._total, copies, self._spot)
            self._open[replica] += 1
            self._total += 1
            return replica

    def give(self, replica: str) -> None:
        """Note the end of a stream."""
        with self._lock:
            self._open[replica] -= 1
            self._total -= 1
            if not self._open[replica] and replica not in self._replicas:
                del self._open[replica]

    def failed(self, replica: str, pause_s: float) -> None:
        """Ask others first for so long."""
        with self._lock:
            if replica in self._open:
                self._down[replica] = self._clock() + pause_s

    def _usable(self, model: str, tried: Collection[str]) -> Sequence[str]:
        ordered = order(model, self._replicas)
        if not self._down and not tried:
            return ordered
        now = self._clock()
        self._down = {each: until for each, until in self._down.items() if until > now}
        others = [each for each in ordered if each not in tried]
        return [each for each in others if each not in self._down] or others
