"""The choice of a model for an alias, and the faults of names that are not served."""

from __future__ import annotations

import difflib
import math
import secrets
from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Final

from loramux_shared.faults import Finding, ModelNotFound, RequestInvalid
from loramux_shared.wording import listed

_DRAWS: Final = 2**64


def choose(alias: str, weights: Mapping[str, int], sticky_key: str) -> str:
    """Return one of the models of an alias; at least one has a weight above 0.

    The same key finds the same model on every replica. A change of weights moves as few keys as possible: each
    model draws a time from the key, exponential with its weight, and the earliest one wins (weighted rendezvous
    hashing, https://www.ietf.org/archive/id/draft-ietf-bess-weighted-hrw-02.html). Without a key one is drawn
    at random.
    """
    key = sticky_key or secrets.token_hex(8)
    return min(
        (name for name, weight in weights.items() if weight), key=lambda name: _time(alias, name, key, weights)
    )


def _time(alias: str, name: str, key: str, weights: Mapping[str, int]) -> tuple[float, str]:
    drawn = blake2b("\0".join((alias, name, key)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -math.log((int.from_bytes(drawn) + 0.5) / _DRAWS) / weights[name], name


EXCERPT: Final = 128
"""Characters of a name that is repeated."""
COMPARED: Final = 200
"""Names, those around it in the order of the alphabet, that a wrong one is compared with."""
LEAST_DIGITS: Final = 8
"""Least digits of a digest behind a name."""
TOLD_DIGITS: Final = 12


def model_not_found(name: str, names: Sequence[str]) -> ModelNotFound:
    """Return the fault of a name; names are those that the caller may use."""
    shortened = name[:EXCERPT]
    near = difflib.get_close_matches(shortened, _around(shortened, names), n=3)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return ModelNotFound(f"no model {shortened!r} is served here.{meant} Served: {listed(names)}.")


def version_not_found(name: str, prefix: str, digests: Collection[str]) -> ModelNotFound:
    """Return the fault of a version that is not, or no longer, known; digests are those that are."""
    known = listed([digest[:TOLD_DIGITS] for digest in digests])
    return ModelNotFound(f"model {name!r} has no version {prefix[:64]} here. Known: {known}.")


def ambiguous_version(name: str, prefix: str, digests: Collection[str]) -> RequestInvalid:
    """Return the fault of digits with which several versions begin."""
    finding = Finding(
        code="E_BAD_FIELD",
        where="model",
        expected="the first digits of one version",
        found=f"{prefix}, with which {len(digests)} of {name} begin: {listed(sorted(digests))}",
        fix="Give more digits.",
    )
    return RequestInvalid("the request names an ambiguous version.", [finding])


def bad_version(name: str, prefix: str) -> RequestInvalid:
    """Return the fault of what stands behind a name and is no beginning of a digest."""
    finding = Finding(
        code="E_BAD_FIELD",
        where="model",
        expected=f"{name}@ and {LEAST_DIGITS} to 64 hex digits of its digest",
        found=repr(prefix[:EXCERPT]),
    )
    return RequestInvalid("the request names a version that is not valid.", [finding])


def _around(name: str, names: Sequence[str]) -> Sequence[str]:
    ordered = sorted(names)
    place = max(0, bisect(ordered, name) - COMPARED // 2)
    return ordered[max(0, min(place, len(ordered) - COMPARED)) :][:COMPARED]
