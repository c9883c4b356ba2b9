"""Deployments in a store: their generations, the pointer to the served one, and changes that are never lost.

A build says what a deployment is; a change says what is to be otherwise. Two changes that begin at the same
generation must both be in the end, on a store without conditional writes: docs/decisions/0039.
"""

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias, TypeVar

import structlog

from loramux_shared.bundle.claims import MAX_CLAIMS, STALE, alone, generation_numbers
from loramux_shared.bundle.generation import (
    DEPLOYMENTS_PREFIX,
    Current,
    Generation,
    current_key,
    generation_key,
)
from loramux_shared.bundle.manifest import REBUILD, sha256_hex
from loramux_shared.faults import BundleCorrupt, DeploymentNotFound, GenerationMismatch, StoreUnavailable
from loramux_shared.storage.base import ObjectMissing, Store
from loramux_shared.wording import listed

log = structlog.get_logger()

T = TypeVar("T")

READ_AGAIN_S: Final = (0.02, 0.05, 0.1)
"""Pauses before a pointer that does not fit is read again."""
_CURRENT = re.compile(r"deployments/([^/]+)/current\.json")


def is_deployment_name(name: str) -> bool:
    """True when a name can stand in a key."""
    return re.fullmatch(r"[a-zA-Z0-9_\-.:]{1,128}", name) is not None and name not in {".", ".."}


def list_deployments(store: Store) -> list[str]:
    """Return the names of the deployments that have a generation, in order."""
    return sorted({match[1] for key in store.list(DEPLOYMENTS_PREFIX) if (match := _CURRENT.fullmatch(key))})


def stored_deployments(store: Store) -> str:
    """Return the names of the deployments for a message."""
    return listed(list_deployments(store))


def current_generation(store: Store, name: str) -> Generation | None:
    """Return the served generation, or None when the store has no such deployment.

    A pointer that does not fit is read again a few times: a store may send parts of two versions of an
    object while it is replaced.

    Raises:
        BundleCorrupt: the pointer or the generation is damaged, or the generation is missing.
        StoreUnavailable: the store does not answer.
    """
    if not is_deployment_name(name):
        return None
    for pause_s in READ_AGAIN_S:
        try:
            return _current_generation(store, name)
        except BundleCorrupt:
            time.sleep(pause_s)
    return _current_generation(store, name)


def require_deployment(store: Store, name: str) -> Generation:
    """Return the served generation of a deployment.

    Raises:
        DeploymentNotFound: the store has none; the message lists those that it has.
        Fault: what `current_generation` raises.
    """
    generation = current_generation(store, name)
    if generation is None:
        raise DeploymentNotFound(
            f"no deployment {name!r} in {store.uri}. There: {stored_deployments(store)}. "
            "Build it first: loramux build FILE."
        )
    return generation


def _current_generation(store: Store, name: str) -> Generation | None:
    current = read_pointer(store, name)
    return None if current is None else read_generation(store, name, current.generation, sha256=current.sha256)


def read_pointer(store: Store, name: str) -> Current | None:
    """Return what says which generation is served, or None when the store has no such deployment. Raise
    BundleCorrupt for bytes that are no pointer's, and StoreUnavailable.
    """
    try:
        data = store.get(current_key(name))
    except ObjectMissing:
        return None
    what = f"deployment {name}: current.json"
    current = Current.from_bytes(data, what=what)
    if current.to_bytes() != data:
        raise BundleCorrupt(f"{what}: not in its canonical form. {REBUILD}")
    return current


def read_generation(store: Store, name: str, number: int, *, sha256: str | None = None) -> Generation:
    """Return a generation; raise BundleCorrupt where it is missing, another's or has another digest than the
    known one, and StoreUnavailable.
    """
    what = f"deployment {name}: generation {number}"
    try:
        data = store.get(generation_key(name, number))
    except ObjectMissing as missing:
        raise BundleCorrupt(f"{what}: expected an object, found none in {store.uri}. {REBUILD}") from missing
    generation = Generation.from_bytes(data, sha256=sha256, what=what)
    if (generation.deployment, generation.number) != (name, number):
        raise BundleCorrupt(
            f"{what}: expected its own record, found generation {generation.number} of {generation.deployment}"
        )
    return generation


def point_at_highest(store: Store, published: Generation) -> Generation:
    """Let the pointer name the highest generation, ours or another's, and return that: its bundles are there.

    Of several builders, the one that puts the pointer last looks again after it, so that it is right in
    the end.
    """
    name, highest, pointer = published.deployment, published, _pointer_to(published)
    for _ in range(MAX_CLAIMS):
        found = _highest(store, published)
        if found.number != highest.number:
            highest, pointer = found, _pointer_to(found)
        if _unless_damaged(lambda: read_pointer(store, name)) == pointer:
            return highest
        store.put(current_key(name), pointer.to_bytes())
    raise StoreUnavailable(f"{store.uri}: too many builders publish {name!r} at once. Build again later.")


def _pointer_to(generation: Generation) -> Current:
    return Current(generation=generation.number, sha256=sha256_hex(generation.to_bytes()))


def _highest(store: Store, published: Generation) -> Generation:
    for number in reversed(generation_numbers(store, published.deployment)):
        if number <= published.number:
            break
        other = read_whole(store, published.deployment, number)
        if other is not None:
            return other
    return published


def read_whole(store: Store, name: str, number: int) -> Generation | None:
    """Return a generation that no pointer vouches for, or None where it is not whole."""
    return _unless_damaged(lambda: _canonical(store, name, number))


def _canonical(store: Store, name: str, number: int) -> Generation:
    """Read a generation that no pointer vouches for: its bytes must be those that we would write."""
    found = read_generation(store, name, number)
    return read_generation(store, name, number, sha256=sha256_hex(found.to_bytes()))


def _unless_damaged(read: Callable[[], T | None]) -> T | None:
    try:
        return read()
    except BundleCorrupt as damage:
        log.warning("record in the store is damaged", problem=damage.message)
        return None


Change: TypeAlias = Callable[[Generation], Generation]
"""Returns what a generation becomes. It is called again on another generation where the first was not the
newest any more; what it raises ends the change, and nothing is published."""
MAX_CHANGE_IDS: Final = 1000
"""Ids of changes that a generation names: more than can be published while a replay of one is possible."""


def newest_generation(store: Store, name: str, known: Generation | None = None) -> Generation:
    """Return the highest whole generation of a deployment: the served one, or one that is about to be.

    One that is known, and is the highest, is not read again: it is immutable.

    Raises:
        DeploymentNotFound: there is none.
        BundleCorrupt: the served one cannot be read, and no higher one can.
        StoreUnavailable: the store does not answer.
    """
    numbers = generation_numbers(store, name) if is_deployment_name(name) else []
    if known is not None and numbers and numbers[-1] == known.number:
        return known
    served = None if not numbers else current_generation(store, name)
    for number in reversed(numbers):
        if served is not None and number <= served.number:
            break
        if (higher := read_whole(store, name, number)) is not None:
            return higher
    if served is None:
        raise DeploymentNotFound(f"no deployment {name[:128]!r}; there are {stored_deployments(store)}")
    return served


def newest_or_none(store: Store, name: str, known: Generation | None = None) -> Generation | None:
    """Return the newest generation, or None where there is none, or it cannot be read."""
    try:
        return newest_generation(store, name, known)
    except (BundleCorrupt, DeploymentNotFound):
        return None


class PartlyApplied(Exception):
    """Some of several changes were published before: each is to be tried alone."""


@dataclass(frozen=True)
class Identity:
    """The changes that a publication makes, so that a replay of them is recognised."""

    ids: tuple[str, ...] = ()
    """Empty: a change that nobody repeats under its id."""
    require_owned: Callable[[], None] = lambda: None
    """Raises where they are another builder's now; called before anything is written."""

    def applied_in(self, generation: Generation | None) -> bool:
        """True when a generation has these changes already; raise PartlyApplied where it has some of them."""
        found = set(self.ids).intersection(generation.changes if generation is not None else ())
        if found and len(found) < len(self.ids):
            raise PartlyApplied
        return bool(found)


NAMELESS: Final = Identity()


def publish_generation(store: Store, generation: Generation, identity: Identity = NAMELESS) -> Generation:
    """Make a generation the served one and return it as published: with a number of its own.

    The bundles that it names must be in the store already. Where the newest generation has the same content,
    that is returned, and nothing is written. Damaged records are logged and replaced.

    Raises:
        DeploymentInvalid: its names conflict.
        StoreUnavailable: the store does not answer, or others publish the same deployment without end.
    """
    return _publish(store, generation.deployment, lambda _: generation, newest_or_none, identity)[0]


def publish_change(
    store: Store,
    name: str,
    change: Change,
    identity: Identity = NAMELESS,
    *,
    expected: int | None = None,
    known: Generation | None = None,
    stale: timedelta = STALE,
    check: Callable[[], None] = lambda: None,
) -> tuple[Generation, bool]:
    """Apply a change to the newest generation and serve what comes of it; returns it, and whether it is new.

    Nothing is published where the change changes nothing, or was published before.

    Raises:
        GenerationMismatch: the newest generation is another than the expected one.
        DeploymentNotFound, BundleCorrupt: see `newest_generation`.
        DeploymentInvalid: the names of what comes of it do not fit together.
        StoreUnavailable: the store does not answer, or others publish the same deployment without end.
        Fault: what the change and the identity raise.
    """

    def checked(before: Generation | None) -> Generation:
        assert before is not None  # noqa: S101 - newest_generation raises instead
        require(before, expected)
        return change(before)

    return _publish(store, name, checked, newest_generation, identity, known, stale, check)


def _publish(
    store: Store,
    name: str,
    change: Callable[[Generation | None], Generation],
    newest: Callable[[Store, str, Generation | None], Generation | None],
    identity: Identity,
    known: Generation | None = None,
    stale: timedelta = STALE,
    check: Callable[[], None] = lambda: None,
) -> tuple[Generation, bool]:
    identity = identity if identity.ids else replace(identity, ids=(secrets.token_hex(16),))
    before = newest(store, name, known)
    if not identity.applied_in(before):
        change(before).check_names()  # what cannot be published claims no number
    for _ in range(MAX_CLAIMS):
        with alone(store, name, stale=stale, check=check) as claim:
            identity.require_owned()
            before = newest(store, name, before)
            done = identity.applied_in(before)
            changed = before if done and before is not None else change(before)
            if before is not None and changed.same_content(before) and not claim.contested:
                return point_at_highest(store, before), done
            changed.check_names()
            ids = dict.fromkeys((*identity.ids, *(before.changes if before else ())))
            update = {
                "number": claim.number,
                "create_time": datetime.now(UTC),
                "changes": tuple(ids)[: max(MAX_CHANGE_IDS, len(identity.ids))],
            }
            published = changed.model_copy(update=update)
            store.put(generation_key(name, claim.number), published.to_bytes())
            if claim.stands():
                point_at_highest(store, published)
                return published, True
    raise StoreUnavailable(f"{store.uri}: too many builders publish {name!r} at once. Try again later.")


def settle(store: Store, name: str) -> Generation | None:
    """Return the newest generation, above all that a builder which stood still may write; None without one.

    Where such a builder seems to be, the newest generation is published once more.
    """
    newest = newest_or_none(store, name)
    return newest and publish_change(store, name, lambda current: current, known=newest)[0]


def find_applied(store: Store, name: str, change: str) -> Generation | None:
    """Return the newest generation where it has a change, though publishing that seemed to fail; else None."""
    identity = Identity((change,))
    if not identity.applied_in(newest_or_none(store, name)):
        return None
    newest = settle(store, name)
    return newest if identity.applied_in(newest) else None


def require(generation: Generation, expected: int | None) -> None:
    """Raise `GenerationMismatch` unless a generation is the expected one, or any is right."""
    if expected is not None and generation.number != expected:
        raise GenerationMismatch(
            f"deployment {generation.deployment}: expected generation {expected}, found {generation.number}. "
            "Look at what changed (`loramux history`), then repeat with the new number."
        )
