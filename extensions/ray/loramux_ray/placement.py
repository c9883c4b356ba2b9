"""The choice of a replica for a request.

Every model has an order of the replicas, by rendezvous hashing: the same in all proxies, and a replica that
leaves moves its own models only. A request goes to the first of the order that has room for it, as far as one
proxy can see:

- A popular model may go to the first ``k`` of its order: a proxy begins somewhere among them, always at the
  same place, and continues to the next as soon as that one has its share. So popular models fill what the
  others leave free, and find themselves resident there.
- No replica has many more streams than the mean: ``1.25 m + sqrt(1.25 m)``, which comes near to 1.25 where they
  are many, and does not send few streams away from where their adapters are.
"""

import math
from collections.abc import Callable, Sequence
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
