"""Claims to numbers of generations: how builders that share nothing but a store publish one after another.

::

    deployments/<name>/claims/<n>-<token>     empty; put before generation n is written, removed after it

A claim whose owner seems dead is revoked: it is put again, with content. An owner that lives finds that after
it wrote, and begins again. A revoked claim stays until its owner or `loramux gc` removes it, so that everybody
takes numbers above what its owner may still write.
"""

import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog

from loramux_shared.bundle.generation import DEPLOYMENTS_PREFIX, claim_key
from loramux_shared.faults import StoreUnavailable
from loramux_shared.storage.base import Entry, ObjectMissing, Store

log = structlog.get_logger()

MAX_CLAIMS: Final = 100
"""Rounds with other builders before one gives up."""
STALE: Final = timedelta(seconds=15)
"""Age by the store's clock at which a claim's owner counts as killed. A claim lasts for a few requests."""
WAIT_S: Final = 60.0
"""For the claims of others."""
LOOKS: Final = 10
"""At the claims of those that came later and will give way, before one gives way too: they may be dead."""
PAUSES_S: Final = (0.005, 0.25)
"""Between two looks at the claims of others, the first and the longest."""
REVOKED: Final = b"revoked"
"""Content of a claim that counts no longer; other claims are empty."""

_CLAIM = re.compile(r"deployments/[^/]+/claims/([0-9]{8,})-([0-9a-f]{16})")
_GENERATION = re.compile(r"deployments/[^/]+/generations/([0-9]{8,})\.json")


@dataclass(frozen=True)
class Claim:
    """The only claim to a number of a deployment that counts."""

    store: Store
    key: str
    number: int
    contested: bool
    """True if the owner of a revoked claim may yet write a generation above the newest one."""

    def stands(self) -> bool:
        """Return whether nobody revoked it: then all that was written under it counts."""
        try:
            return self.store.get(self.key) != REVOKED
        except ObjectMissing:
            return False


def generation_numbers(store: Store, name: str) -> list[int]:
    """Return the numbers of a deployment's generations, ascending, served or not."""
    keys = store.list(f"{DEPLOYMENTS_PREFIX}{name}/generations/")
    return sorted(int(match[1]) for key in keys if (match := _GENERATION.fullmatch(key)))


def claimed_numbers(store: Store, name: str) -> dict[int, list[str]]:
    """Return the tokens of the builders that claim numbers of a deployment, in order."""
    found: dict[int, list[str]] = {}
    for key in store.list(_claims(name)):
        if match := _CLAIM.fullmatch(key):
            found.setdefault(int(match[1]), []).append(match[2])
    return found


@contextmanager
def alone(
    store: Store, name: str, *, stale: timedelta = STALE, check: Callable[[], None] = lambda: None
) -> Iterator[Claim]:
    """Hold the only claim to a number of a deployment, above all that are used.

    A later claimant sees this claim and takes a higher number, or waits. An earlier claimant is waited for,
    unless a higher generation shows that its claim came to nothing; a stale claim is revoked. Raise
    StoreUnavailable where others publish the same deployment without end.
    """
    pause_s, end = PAUSES_S[0], time.monotonic() + WAIT_S
    while (claim := _claim_alone(store, name, stale, check)) is None:
        if time.monotonic() > end:
            raise StoreUnavailable(f"{store.uri}: too many builders publish {name!r} at once. Try again later.")
        check()
        time.sleep(random.uniform(0, pause_s))  # noqa: S311 - those that met must not meet again
        pause_s = min(2 * pause_s, PAUSES_S[1])
    try:
        yield claim
    finally:
        try:
            store.delete(claim.key)
        except StoreUnavailable as fault:  # what was written under it counts all the same
            log.warning("claim could not be removed, others wait until it is stale", problem=fault.message)


def _claim_alone(store: Store, name: str, stale: timedelta, check: Callable[[], None]) -> Claim | None:
    """Return a claim that is the only one, or None where others have claims too."""
    claims = claimed_numbers(store, name)
    number = max([0, *claims, *generation_numbers(store, name)]) + 1
    key = claim_key(name, number, secrets.token_hex(8))
    store.put(key, b"")
    for _ in range(LOOKS):
        entries = {entry.key: entry for entry in store.entries(_claims(name))}
        highest = max(generation_numbers(store, name), default=0)  # after the claims: they go after it came
        mine = entries.pop(key, None)
        if mine is None or mine.size or highest >= number:
            break
        above = [entry for entry in entries.values() if _number_of(entry) > highest]
        others = [entry.key for entry in above if not entry.size and mine.modified - entry.modified < stale]
        if not others:
            for entry in above:
                if not entry.size:
                    store.put(entry.key, REVOKED)
            return Claim(store, key, number, contested=bool(above))
        if min(others) < key:  # of several, the first stays and the others go
            break
        check()
    store.delete(key)
    return None


def _number_of(entry: Entry) -> int:
    """Return the number that a claim is to; 0 for what is no claim."""
    match = _CLAIM.fullmatch(entry.key)
    return int(match[1]) if match else 0


def _claims(name: str) -> str:
    return f"{DEPLOYMENTS_PREFIX}{name}/claims/"
