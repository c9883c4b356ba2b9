"""Claims to numbers of generations: how builders that share nothing but a store never write the same one.

::

    deployments/<name>/claims/<n>-<token>     empty; put before generation n is written, removed after it
"""

import itertools
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from loramux_shared.bundle.generation import DEPLOYMENTS_PREFIX, claim_key
from loramux_shared.faults import StoreUnavailable
from loramux_shared.storage.base import Entry, Store

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

_CLAIM = re.compile(r"deployments/[^/]+/claims/([0-9]{8,})-([0-9a-f]{16})")
_GENERATION = re.compile(r"deployments/[^/]+/generations/([0-9]{8,})\.json")


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


def claim_number(store: Store, name: str, served: int) -> tuple[int, str]:
    """Return a number that no other builder will use, above all that are used, and the key of the claim to it.

    Of two builders that claim one number, the one that lists later sees the other's claim, or its generation,
    and gives way; both may. Only who is alone with a claim, and finds no higher one, after it was put, has the
    number. Raise StoreUnavailable where others publish the same deployment without end.
    """
    token, ahead = secrets.token_hex(8), 0
    pause_s, end = PAUSES_S[0], time.monotonic() + WAIT_S
    for attempt in itertools.count():
        if attempt > LOOKS:  # writers that collide each time need random pauses
            if attempt > MAX_CLAIMS and time.monotonic() > end:
                break
            time.sleep(random.uniform(0, pause_s))  # noqa: S311 - no secret
            pause_s = min(2 * pause_s, PAUSES_S[1])
        # In this order: a claim is only removed after its generation is published.
        claims = claimed_numbers(store, name)
        number = max([served, *claims, *generation_numbers(store, name)]) + 1 + ahead
        claim = claim_key(name, number, token)
        store.put(claim, b"")
        claims = claimed_numbers(store, name)
        tokens = claims.get(number, [])
        written = max(generation_numbers(store, name), default=0)
        if tokens == [token] and max(claims) == number and written < number:
            return number, claim
        store.delete(claim)
        ahead = sum(other < token for other in tokens)  # each of those that meet here continues elsewhere
    raise _crowded(store, name)


@contextmanager
def alone(
    store: Store, name: str, *, stale: timedelta = STALE, check: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Hold the only claim to a number of a deployment, above all that are used; yield the number.

    A later claimant sees this claim and takes a higher number, or waits. An earlier claimant is waited for,
    unless a higher generation shows that its claim came to nothing, or it is stale. So between this and the end
    of the block nobody else writes a generation below the number. Raise StoreUnavailable where others publish
    the same deployment without end.
    """
    pause_s, end = PAUSES_S[0], time.monotonic() + WAIT_S
    while (claimed := _claim_alone(store, name, stale, check)) is None:
        if time.monotonic() > end:
            raise _crowded(store, name)
        check()
        time.sleep(random.uniform(0, pause_s))  # noqa: S311 - those that met must not meet again
        pause_s = min(2 * pause_s, PAUSES_S[1])
    number, claim = claimed
    try:
        yield number
    finally:
        store.delete(claim)


def _claim_alone(
    store: Store, name: str, stale: timedelta, check: Callable[[], None]
) -> tuple[int, str] | None:
    """Return a number and the claim to it, or None where others have claims too."""
    claims = claimed_numbers(store, name)
    number = max([0, *claims, *generation_numbers(store, name)]) + 1
    claim = claim_key(name, number, secrets.token_hex(8))
    store.put(claim, b"")
    for _ in range(LOOKS):
        entries = {entry.key: entry for entry in store.entries(_claims(name))}
        highest = max(generation_numbers(store, name), default=0)  # after the claims, see `claim_number`
        mine = entries.pop(claim, None)
        if mine is None or highest >= number:
            break
        others = [key for key, entry in entries.items() if _blocks(entry, mine, highest, stale)]
        if not others:
            return number, claim
        if min(others) < claim:  # of several, the first stays and the others go
            break
        check()
    store.delete(claim)
    return None


def _blocks(entry: Entry, mine: Entry, highest: int, stale: timedelta) -> bool:
    match = _CLAIM.fullmatch(entry.key)
    return match is not None and int(match[1]) > highest and mine.modified - entry.modified < stale


def _claims(name: str) -> str:
    return f"{DEPLOYMENTS_PREFIX}{name}/claims/"


def _crowded(store: Store, name: str) -> StoreUnavailable:
    return StoreUnavailable(f"{store.uri}: too many builders publish {name!r} at once. Try again later.")
