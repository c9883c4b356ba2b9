"""Which of its models an alias stands for."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

_DRAWS: Final = 2**64


def choose(alias: str, weights: Mapping[str, int], sticky_key: str) -> str:
    """Return one of the models of an alias; at least one has a weight above 0.

    The same key finds the same model on every replica. A change of weights moves no more keys than it must:
    each model draws a time from the key, exponential with its weight, and the earliest one wins (weighted
    rendezvous hashing, https://www.ietf.org/archive/id/draft-ietf-bess-weighted-hrw-02.html). Without a key
    one is drawn at random.
    """
    key = sticky_key or secrets.token_hex(8)
    return min(
        (name for name, weight in weights.items() if weight), key=lambda name: _time(alias, name, key, weights)
    )


def _time(alias: str, name: str, key: str, weights: Mapping[str, int]) -> tuple[float, str]:
    drawn = blake2b("\0".join((alias, name, key)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -math.log((int.from_bytes(drawn) + 0.5) / _DRAWS) / weights[name], name
