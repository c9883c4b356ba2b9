"""Builds that were accepted and have not ended, kept in the store for a builder that is started again.

::

    builds/<deployment>/<owner>.json     written before the build begins, removed when it ended

The owner writes it again every few seconds while the build runs. An entry that does not change for a while
belongs to a builder that is gone, and is taken over by any other one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from datetime import datetime

import structlog
from pydantic import Field, model_validator

from builder_service.pipeline.build import BuildResult, build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.update import update
from builder_service.pipeline.wishes import Update
from loramux_shared.bundle.generation import BUILDS_PREFIX
from loramux_shared.bundle.manifest import Record
from loramux_shared.deployment import Deployment
from loramux_shared.faults import BundleCorrupt, RecordTooLarge
from loramux_shared.storage.base import ObjectMissing, Store
from loramux_shared.storage.bounds import JOURNAL_BYTES

log = structlog.get_logger()


class JournalEntry(Record):
    """An accepted build: of a whole deployment, or an update of one."""

    deployment: Deployment | None = None
    update: Update | None = None
    verify: bool = False
    """Whether every byte of the bundles that are kept is to be read back."""
    exact: bool = False
    """Whether adapters that the deployment does not name are to leave, however they came."""
    request_id: str = ""
    create_time: datetime
    attempt: int = Field(default=1, ge=1)
    """Counts the starts of a builder that ran it."""
    cancelled: bool = False
    """Whether a client wants it to end."""
    beat: int = 0
    """Changes while its builder lives."""

    @model_validator(mode="after")
    def _is_one(self) -> JournalEntry:
        if (self.deployment is None) == (self.update is None):
            raise ValueError("a deployment or an update")
        return self

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.update.name if self.update else self._whole.model_name

    @property
    def adapters(self) -> Collection[str]:
        """The names of the adapters that are made."""
        return self.update.add if self.update else self._whole.build.lora_adapters

    @property
    def wish(self) -> tuple[Deployment | None, Update | None, bool, bool]:
        """What was asked for: the same for a call that is repeated."""
        return self.deployment, self.update, self.verify, self.exact

    @property
    def _whole(self) -> Deployment:
        assert self.deployment is not None  # noqa: S101 - the validator's word
        return self.deployment

    def run(self, context: BuildContext, progress: Progress) -> BuildResult:
        """Do it. Blocks; raises what `build` and `update` raise."""
        if self.update is not None:
            return update(self.update, context, progress, again=self.attempt > 1)
        return build(self._whole, context, progress, verify=self.verify, exact=self.exact)


class Journal:
    """The entries of all builders on a store, of which one's own may be written; blocking."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._lock = threading.Lock()
        self._live: dict[str, JournalEntry] = {}

    def write(self, entry: JournalEntry) -> None:
        """Record a build before it begins."""
        name = entry.name
        with self._lock:  # a beat must not bring back an entry that is being removed
            self._store.put(self._key(name), entry.to_bytes())
            self._live[name] = entry

    def update(self, entry: JournalEntry) -> None:
        """Record what changed about a build, unless it ended meanwhile."""
        with self._lock:
            if entry.name in self._live:
                self._store.put(self._key(entry.name), entry.to_bytes())
                self._live[entry.name] = entry

    def remove(self, name: str) -> None:
        """Forget a build that ended."""
        with self._lock:
            self._live.pop(name, None)
            self._store.delete(self._key(name))

    def leave(self, name: str) -> None:
        """Leave a build that did not end to whoever comes next."""
        with self._lock:
            self._live.pop(name, None)

    def beat(self) -> None:
        """Show that this builder lives."""
        for name in list(self._live):
            with self._lock:
                if name in self._live:
                    entry = self._live[name]
                    entry = entry.model_copy(update={"beat": entry.beat + 1})
                    self._store.put(self._key(name), entry.to_bytes())
                    self._live[name] = entry

    def mine(self) -> list[JournalEntry]:
        """Return the builds that an earlier run of this owner did not end."""
        found = self._read(lambda owner: owner == self._owner)
        return [entry for key, data in found.items() if (entry := self.parse(key, data)) is not None]

    def others(self) -> dict[str, bytes]:
        """Return the entries of other builders by key."""
        return self._read(lambda owner: owner != self._owner)

    def parse(self, key: str, data: bytes) -> JournalEntry | None:
        """Return an entry; one that cannot be read is logged and removed."""
        try:
            return JournalEntry.from_bytes(data, what=key)
        except BundleCorrupt as damage:
            self._dropped(key, damage)
            return None

    def drop(self, key: str) -> None:
        """Remove an entry of another builder, which was taken over."""
        self._store.delete(key)

    def _read(self, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        found, left = dict[str, bytes](), JOURNAL_BYTES
        for key in list(self._store.list(BUILDS_PREFIX)):
            if wanted(key.rpartition("/")[2].removesuffix(".json")):
                try:
                    data = self._store.get(key)
                except ObjectMissing:
                    continue
                except RecordTooLarge as damage:
                    self._dropped(key, damage)
                    continue
                left -= len(data)
                if left < 0:
                    log.warning("journal entries are too large together, the rest is not read", first=key)
                    break
                found[key] = data
        return found

    def _dropped(self, key: str, damage: BundleCorrupt) -> None:
        log.warning("journal entry dropped", key=key, problem=damage.message)
        self._store.delete(key)

    def _key(self, name: str) -> str:
        return f"{BUILDS_PREFIX}{name}/{self._owner}.json"


class Abandoned:
    """Finds the entries that do not change. Compares what it saw itself: clocks of others do not matter."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, tuple[bytes, float]] = {}

    def among(self, entries: Mapping[str, bytes], now_s: float) -> list[str]:
        """Return the keys of entries that are what they were a lease ago."""
        before, self._seen = self._seen, {}
        for key, data in entries.items():
            same = key in before and before[key][0] == data
            self._seen[key] = before[key] if same else (data, now_s)
        return [key for key, (_, since_s) in self._seen.items() if now_s - since_s >= self._lease_s]
