"""Builds that were accepted and have not ended, kept in the store for a builder that is started again.

::

    builds/<deployment>/<owner>.json     written before the build begins, removed when it ended

The owner writes it again every few seconds while the build runs. An entry that does not change for a while
belongs to a builder that is gone, and is taken over by any other one. The changes of a deployment that wait for
their turn stand in one entry, so that hundreds which come at once cost few requests.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import structlog
from pydantic import Field, model_validator

from builder_service.pipeline.build import BuildResult, build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.update import Update, update
from loramux_shared.bundle.generation import BUILDS_PREFIX
from loramux_shared.bundle.manifest import Record
from loramux_shared.deployment import Deployment
from loramux_shared.faults import BundleCorrupt, QueueFull, RecordTooLarge, StoreUnavailable
from loramux_shared.storage.base import JOURNAL_BYTES, ObjectMissing, Store, bound_of

log = structlog.get_logger()


class JournalEntry(Record):
    """An accepted build: of a whole deployment, or an update of one."""

    deployment: Deployment | None = None
    update: Update | None = None
    verify: bool = False
    """True if every byte of the bundles that are kept is to be read back."""
    exact: bool = False
    """True if adapters that the deployment does not name are to leave, however they came."""
    request_id: str = ""
    create_time: datetime
    attempt: int = Field(default=1, ge=1)
    """Counts the starts of a builder that ran it."""
    cancelled: bool = False
    """True if a client cancelled it."""
    beat: int = 0
    """Changes while its builder lives."""
    behind: tuple[JournalEntry, ...] = Field(default=(), exclude_if=lambda behind: not behind)
    """The builds of the deployment that were accepted after it."""

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
        """Return the content of the request, which is equal for a repeated call."""
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


@dataclass
class _Page:
    """The builds of a deployment that have not ended, and what of them is in the store."""

    entries: dict[str, JournalEntry] = field(default_factory=dict)
    """Keyed by build."""
    left: bool = False
    """True if the builds continue in another run of a builder: then the store is not changed."""
    changes: Iterator[int] = field(default_factory=partial(itertools.count, 1))
    stored: int = 0
    """The newest of the changes that are in the store."""
    beat: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held during a write: a beat must not bring back an entry that is being removed."""


class Journal:
    """The entries of all builders on a store, of which one's own may be written; blocking.

    Calls about one deployment that come while one of them writes are written together.
    """

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._pages: dict[str, _Page] = {}

    def add(self, key: str, entry: JournalEntry) -> None:
        """Take a build that is about to begin, under a key of the caller's choice; does not block."""
        self._pages.setdefault(entry.name, _Page()).entries[key] = entry

    def save(self, key: str, name: str) -> None:
        """Record a build that was added.

        Raises:
            StoreUnavailable: it is not recorded, and was removed from the builds.
            QueueFull: likewise; those that wait are too large together.
        """
        try:
            self._store_page(name)
        except BaseException:
            self._pages[name].entries.pop(key, None)
            raise

    def update(self, key: str, entry: JournalEntry) -> None:
        """Record what changed about a build, unless it ended meanwhile."""
        page = self._pages[entry.name]
        if key in page.entries:
            page.entries[key] = entry
            self._store_page(entry.name)

    def remove(self, key: str, name: str) -> None:
        """Forget a build that ended."""
        self._pages[name].entries.pop(key, None)
        self._store_page(name)

    def leave(self, name: str) -> None:
        """Leave the unfinished builds of a deployment to the next builder."""
        self._pages[name].left = True

    def beat(self) -> None:
        """Show that this builder lives."""
        for name, page in list(self._pages.items()):
            if page.entries:
                page.beat += 1
                self._store_page(name)

    def _store_page(self, name: str) -> None:
        page = self._pages[name]
        change = next(page.changes)
        with page.lock:
            if page.stored > change or page.left:
                return
            change = next(page.changes)  # higher than the number of each change whose entries are read here
            entries = list(page.entries.values())
            if entries:
                update = {"beat": page.beat, "behind": tuple(entries[1:])}
                data = entries[0].model_copy(update=update).to_bytes()
                if len(data) > bound_of(self._key(name)):
                    raise QueueFull(
                        f"the changes of {name} in the queue are too large together. Call again later."
                    )
                self._store.put(self._key(name), data)
            else:
                self._store.delete(self._key(name))
            page.stored = change

    def mine(self) -> list[JournalEntry]:
        """Return the builds that an earlier run of this owner did not end."""
        found = self._read(lambda owner: owner == self._owner)
        return [entry for key, data in found.items() for entry in self.parse(key, data)]

    def others(self) -> dict[str, bytes]:
        """Return the entries of other builders by key."""
        return self._read(lambda owner: owner != self._owner)

    def parse(self, key: str, data: bytes) -> list[JournalEntry]:
        """Return the builds of an entry; one that cannot be read is logged and removed."""
        try:
            first = JournalEntry.from_bytes(data, what=key)
        except BundleCorrupt as damage:
            self._dropped(key, damage)
            return []
        return [first.model_copy(update={"behind": ()}), *first.behind]

    def drop(self, key: str) -> None:
        """Remove an entry of another builder, which was taken over."""
        self._store.delete(key)

    def _read(self, selects: Callable[[str], bool]) -> dict[str, bytes]:
        found, left = dict[str, bytes](), JOURNAL_BYTES
        for key in list(self._store.list(BUILDS_PREFIX)):
            if selects(key.rpartition("/")[2].removesuffix(".json")):
                try:
                    data = self._store.get(key)
                except ObjectMissing:
                    continue
                except RecordTooLarge as damage:
                    self._dropped(key, damage)
                    continue
                left -= len(data)
                if left < 0:
                    log.warning(
                        "journal entries exceed their size limit together, the rest is ignored", first=key
                    )
                    break
                found[key] = data
        return found

    def _dropped(self, key: str, damage: BundleCorrupt) -> None:
        log.warning("journal entry is damaged, ignored", key=key, problem=damage.message)
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


@dataclass(frozen=True)
class BuildLimits:
    """The operator's limits of builds."""

    running: int = 2
    """Builds at once; others wait."""
    waiting: int = 1000
    """Builds that wait; one more is answered QUEUE_FULL."""
    timeout_s: float = 6 * 3600
    """Seconds that one build may run."""
    beat_s: float = 15
    """Between two signs of life of the running builds."""
    lease_s: float = 90
    """Seconds without a sign of life after which another builder takes a build over."""


class Keeper:
    """Works until it is cancelled; take_over runs a build, and says whether its old entry may go."""

    def __init__(
        self, journal: Journal, limits: BuildLimits, take_over: Callable[[JournalEntry], Awaitable[bool]]
    ) -> None:
        self._journal = journal
        self._beat_s = limits.beat_s
        self._abandoned = Abandoned(limits.lease_s)
        self._take_over = take_over

    async def run(self) -> None:
        """Give a sign of life, then look at the others' builds, again and again."""
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                await self._round()
            except StoreUnavailable as fault:
                log.warning("journal cannot be written: the store does not answer", problem=fault.message)

    async def _round(self) -> None:
        await asyncio.to_thread(self._journal.beat)
        others = await asyncio.to_thread(self._journal.others)
        for key in self._abandoned.among(others, asyncio.get_running_loop().time()):
            entries = await asyncio.to_thread(self._journal.parse, key, others[key])
            taken = [await self._take_over(entry) for entry in entries]
            if all(taken):
                await asyncio.to_thread(self._journal.drop, key)
