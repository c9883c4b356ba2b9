"""The removal of objects in a store that nothing refers to any longer.

Never removed is what a generation that stays refers to, what is younger than the grace period, a generation
that is served or newer than the served one, any generation of a deployment that is being built, and what is not
in the form that this format has.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import groupby
from typing import Final

from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import read_generation, read_pointer
from loramux_shared.bundle.generation import BUILDS_PREFIX, DEPLOYMENTS_PREFIX, generation_key, signature_key
from loramux_shared.bundle.manifest import MANIFEST_FILE, REMOVAL_FILE, bundle_key
from loramux_shared.faults import BuildInProgress
from loramux_shared.storage.base import Entry, Store

MIN_GRACE: Final = timedelta(hours=1)
"""While builds run: a bundle that a build found there is put again, and then a generation refers to it."""

_BUNDLE: Final = re.compile(r"(bundles/sha256/([0-9a-f]{64})/)[^/]+")
_DEPLOYMENT: Final = re.compile(r"deployments/([^/]+)/.+")
_CLAIM: Final = re.compile(r"deployments/([^/]+)/claims/([0-9]{8,})-[0-9a-f]{16}")

_SIGNATURE: Final = re.compile(r"(deployments/[^/]+/generations/[0-9]{8,}\.json)\.sig")


class Kind(StrEnum):
    """The kind of an orphan."""

    BUNDLE = "bundle"
    GENERATION = "generation"
    CLAIM = "claim"
    SIGNATURE = "signature"


@dataclass(frozen=True)
class Orphan:
    """Objects that can go together."""

    kind: Kind
    name: str
    """Digest of a bundle, else the key."""
    why: str
    entries: tuple[Entry, ...]
    """Objects in the order of removal: of a bundle the manifest first, so that the bundle is gone at once."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.entries)

    @property
    def modified(self) -> datetime:
        """When the newest object was put."""
        return max(entry.modified for entry in self.entries)


@dataclass(frozen=True)
class RetainedGeneration:
    """A generation that stays, and with it all bundles to which it refers."""

    deployment: str
    number: int
    why: str
    bundles: int


@dataclass(frozen=True)
class Retention:
    """The rule for generations before the served one that stay for a rollback: either bound keeps one."""

    count: int | None = None
    """Number of generations to keep; None: no rule."""
    age: timedelta | None = None
    """Those that were published within this time; None: no rule. Without any rule all stay."""

    def why(self, distance: int, age: timedelta) -> str | None:
        """Return why a generation stays that is so many before the served one, and so old; None: it goes."""
        if self.count is None and self.age is None:
            return "all are kept, unless --keep or --keep-for is given"
        if self.count is not None and distance <= self.count:
            return f"one of the {self.count} before the served one"
        if self.age is not None and age < self.age:
            return f"published in the last {self.age.total_seconds() / 86400:g} days"
        return None


@dataclass(frozen=True)
class Orphans:
    """Objects that nothing refers to, and those that stay."""

    old: tuple[Orphan, ...]
    """Those that may be removed."""
    young: tuple[Orphan, ...]
    """Those of the grace period: a build may be about to refer to them."""
    kept: tuple[RetainedGeneration, ...] = ()
    """Kept generations by deployment, the newest first."""


ALL: Final = Retention()


def find_orphans(store: Store, *, grace: timedelta, now: datetime, retention: Retention = ALL) -> Orphans:
    """Return what nothing refers to, and generations that no rule keeps.

    Raises:
        BundleCorrupt: a pointer or a generation that stays cannot be read, so that nobody knows to what it
            refers.
        StoreUnavailable: the store does not answer.
    """
    # In this order: a build is in the journal before it looks which bundles it may keep, and a bundle that a
    # generation refers to from now on is seen to be referred to.
    building = {key.split("/")[1] for key in store.list(BUILDS_PREFIX) if key.count("/") > 1}
    bundles = [entry for entry in store.entries("bundles/") if _BUNDLE.fullmatch(entry.key)]
    records = list(store.entries(DEPLOYMENTS_PREFIX))
    names = sorted({match[1] for entry in records if (match := _DEPLOYMENT.fullmatch(entry.key))})
    expired, retained, referred = list[Orphan](), list[RetainedGeneration](), set[str]()
    entries = {entry.key: entry for entry in records}
    for name in names:
        for number, why in _judged(store, name, entries, retention, now, building=name in building).items():
            entry = entries.get(generation_key(name, number))
            if why is None and entry is not None:
                signature = entries.get(signature_key(entry.key))
                both = (entry, signature) if signature is not None else (entry,)
                expired.append(Orphan(Kind.GENERATION, entry.key, "no rule keeps it for a rollback", both))
                if now - entry.modified >= grace:
                    continue
            generation = read_generation(store, name, number)
            digests = {record.digest for record in generation.adapters.values()}
            retained.append(
                RetainedGeneration(name, number, why or "younger than the grace period", len(digests))
            )
            referred |= digests
    orphans = [*expired, *_claims(store, records), *_signatures(entries), *_bundles(bundles, referred)]
    old = tuple(orphan for orphan in orphans if now - orphan.modified >= grace)
    return Orphans(old, tuple(orphan for orphan in orphans if orphan not in old), tuple(retained))


def _judged(
    store: Store,
    name: str,
    entries: Mapping[str, Entry],
    retention: Retention,
    now: datetime,
    *,
    building: bool,
) -> dict[int, str | None]:
    """Return why each generation of a deployment stays, the newest first; None: nothing keeps it."""
    pointer = read_pointer(store, name)
    numbers = generation_numbers(store, name)[::-1]
    served = pointer.generation if pointer is not None else 0
    judged, distance = dict[int, str | None](), 0
    for number in numbers:
        entry = entries.get(generation_key(name, number))
        if number == served:
            judged[number] = "served"
        elif number > served:
            judged[number] = "newer than the served one"
        elif building or entry is None:
            judged[number] = "its deployment is being built"
        else:
            distance += 1
            judged[number] = retention.why(distance, now - entry.modified)
    return judged


def check_grace(store: Store, grace: timedelta) -> None:
    """Raise `BuildInProgress` where a grace period is too short to remove anything while builds run."""
    running = next(store.list(BUILDS_PREFIX), None)
    if running is not None and grace < MIN_GRACE:
        raise BuildInProgress(
            f"{running}: a build runs, or was interrupted and will be resumed. "
            f"Wait for it, or use a grace period of at least {MIN_GRACE.total_seconds() / 3600:g}h."
        )


def remove(store: Store, orphan: Orphan) -> bool:
    """Remove an orphan, unless it was put again or is needed after all; returns whether it is gone.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    if orphan.kind is Kind.BUNDLE:
        return _remove_bundle(store, orphan)
    first = orphan.entries[0].key
    now_there = {entry.key: entry.modified for entry in store.entries(first.removesuffix(".sig"))}
    if any(modified > orphan.modified for modified in now_there.values()):
        return False
    if orphan.kind is Kind.SIGNATURE and first.removesuffix(".sig") in now_there:
        return False
    for entry in orphan.entries:
        store.delete(entry.key)
    return True


def _remove_bundle(store: Store, orphan: Orphan) -> bool:
    """Remove a bundle unless a builder put any of it again, which sees the mark otherwise and waits."""
    mark = bundle_key(orphan.name, REMOVAL_FILE)
    store.put(mark, b"")
    now_there = {entry.key: entry.modified for entry in store.entries(bundle_key(orphan.name, ""))}
    unchanged = mark in now_there and all(
        modified <= orphan.modified for key, modified in now_there.items() if key != mark
    )
    for entry in orphan.entries if unchanged else ():
        if entry.key != mark:
            store.delete(entry.key)
    store.delete(mark)
    return unchanged


def _claims(store: Store, records: list[Entry]) -> Iterator[Orphan]:
    """Claims below a generation: their numbers will not be used, whether or not their builders live."""
    for entry in records:
        match = _CLAIM.fullmatch(entry.key)
        if match and any(number > int(match[2]) for number in generation_numbers(store, match[1])):
            yield Orphan(Kind.CLAIM, entry.key, "left by an interrupted builder", (entry,))


def _signatures(entries: Mapping[str, Entry]) -> Iterator[Orphan]:
    """Signatures whose generations are not there: a builder puts them first."""
    for key, entry in entries.items():
        match = _SIGNATURE.fullmatch(key)
        if match and match[1] not in entries:
            yield Orphan(Kind.SIGNATURE, key, "of a missing generation", (entry,))


def _bundles(entries: list[Entry], referred: set[str]) -> Iterator[Orphan]:
    for digest, found in groupby(entries, key=lambda entry: entry.key.split("/")[2]):
        if digest not in referred:
            files = sorted(found, key=lambda entry: not entry.key.endswith(f"/{MANIFEST_FILE}"))
            whole = files[0].key.endswith(f"/{MANIFEST_FILE}")
            why = "no generation refers to it" if whole else "without its manifest: a build was interrupted"
            yield Orphan(Kind.BUNDLE, digest, why, tuple(files))
