"""Accepted changes that have not ended, in the store: one queue for each deployment, which all builders share.

::

    builds/<deployment>/<place>-<arrival>-<id>-<run>.json    put before the call is answered
    builders/<run>.json                                      put again every few seconds while a builder lives

A run is one life of a builder. Only the run in its key puts an entry again, or removes it when its change
ended; a run that takes an entry over puts one of its own, in the same place, before it removes the old one. A
change begins when no other builder has an earlier place, and is published only while its entry is there.
"""

from __future__ import annotations

import itertools
import re
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, TypeAlias

import structlog
from pydantic import Field, model_validator

from builder_service.pipeline.update import Update
from loramux_shared.bundle.generation import BUILDERS_PREFIX, BUILDS_PREFIX
from loramux_shared.bundle.manifest import Record, sha256_hex
from loramux_shared.deployment import Deployment
from loramux_shared.faults import BundleCorrupt, RequestInvalid, StoreUnavailable
from loramux_shared.storage.base import ObjectMissing, Store, bound_of
from loramux_shared.storage.patient import PatientStore

log = structlog.get_logger()


class JournalEntry(Record):
    """An accepted change: a build of a whole deployment, or an update of one."""

    deployment: Deployment | None = None
    update: Update | None = None
    verify: bool = False
    """True if every byte of the bundles that are kept is to be read back."""
    exact: bool = False
    """True if adapters that the deployment does not name are to leave, however they came."""
    request_id: str = ""
    create_time: datetime
    attempt: int = Field(default=1, ge=1)
    """Counts the runs of builders that began it."""
    cancelled: bool = False
    """True if a client cancelled it."""

    @model_validator(mode="after")
    def _is_one(self) -> JournalEntry:
        if (self.deployment is None) == (self.update is None):
            raise ValueError("a deployment or an update")
        return self

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.update.name if self.update else self.whole.model_name

    @property
    def adapters(self) -> Collection[str]:
        """The names of the adapters that are made."""
        return self.update.add if self.update else self.whole.build.lora_adapters

    @property
    def wish(self) -> tuple[Deployment | None, Update | None, bool, bool]:
        """The content of the request, which is equal for a repeated call."""
        return self.deployment, self.update, self.verify, self.exact

    @property
    def whole(self) -> Deployment:
        """The deployment of a build."""
        assert self.deployment is not None  # noqa: S101 - the validator's word
        return self.deployment

    def draw_id(self) -> str:
        """Return an id: the same for each call with one request id and content, else a new one."""
        if not self.request_id:
            return uuid.uuid4().hex
        content = self.model_dump_json(include={"deployment", "update", "verify", "exact", "request_id"})
        return sha256_hex(content.encode())[:32]


_KEY: Final = re.compile(
    r"builds/([^/]+)/([0-9]{10})-([0-9]{6})-([0-9a-f]{32})-([0-9A-Za-z]+\.[0-9a-f]{16})\.json"
)
_BEAT: Final = re.compile(r"builders/([0-9A-Za-z]+\.[0-9a-f]{16})\.json")


Order: TypeAlias = tuple[int, int, str]
"""Sort key of a deployment's queue, the same for the entries of all builders."""
FIRST: Final[Order] = (0, 0, "")
LAST: Final[Order] = (10**10, 0, "")


@dataclass(frozen=True)
class Ticket:
    """An entry's place in the queue of its deployment, and the run of a builder to which it belongs."""

    deployment: str
    place: int
    arrival: int
    """Order of the calls that one run answered with the same place."""
    change: str
    """Id of the change."""
    run: str

    @property
    def order(self) -> Order:
        """Return the place among all entries of the deployment."""
        return self.place, self.arrival, self.change

    @property
    def key(self) -> str:
        """The entry's key in the store."""
        place = f"{self.place:010d}-{self.arrival:06d}"
        return f"{BUILDS_PREFIX}{self.deployment}/{place}-{self.change}-{self.run}.json"

    @classmethod
    def parse(cls, key: str) -> Ticket | None:
        """Return the ticket of a key; None for what is no entry's."""
        match = _KEY.fullmatch(key)
        return cls(match[1], int(match[2]), int(match[3]), match[4], match[5]) if match else None


class TakenOver(Exception):
    """Another builder has the change now; what becomes of it is reported there."""


class Journal:
    """The queues of a store, and the entries of one run of a builder in them; blocking, from any thread."""

    def __init__(
        self, store: Store, owner: str, lease_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin a run of an owner; an owner has one run at a time, and is judged dead after lease_s seconds."""
        self._store = store
        self._patient = PatientStore(store)
        """For what is taken over: a start with many changes must outlive requests that fail."""
        self._owner = owner
        self.run = f"{owner}.{secrets.token_hex(8)}"
        self._lease_s = lease_s
        self._clock = clock
        self._beats = itertools.count(1)
        self._arrivals = itertools.count()
        self._beat_at: float | None = None
        self._lapses = 0
        """Times that others may have judged this run dead."""
        self._leaving: dict[str, int] = {}
        """Keys of entries that are being removed, each with the lapses before it was seen to be there."""
        self._doubtful: dict[str, None] = {}
        """Keys that are to be removed: of entries that may have been put, or that were taken over."""

    def beat(self) -> None:
        """Show that this run lives."""
        began = self._clock()
        self._store.put(_beat_key(self.run), b'{"beat":%d}' % next(self._beats))
        self._lapses += self._is_late(began)
        self._beat_at = began

    def end_run(self, run: str | None = None) -> None:
        """Remove the sign of life of a run, this one by default: others take over at once what it leaves."""
        self._store.delete(_beat_key(run or self.run))

    def _is_late(self, now: float | None = None) -> bool:
        since = self._beat_at
        return since is not None and (self._clock() if now is None else now) - since >= self._lease_s

    def next_place(self, deployment: str) -> int:
        """Return the place behind all entries of a deployment."""
        return max((ticket.place for ticket in self.queue(deployment)), default=0) + 1

    def add(self, place: int, change: str, entry: JournalEntry) -> Ticket:
        """Record a change.

        Raises:
            RequestInvalid: it is too large.
            StoreUnavailable: it is not recorded.
        """
        ticket = Ticket(entry.name, place, next(self._arrivals) % 10**6, change, self.run)
        data = entry.to_bytes()
        if len(data) > (most := bound_of(ticket.key)):
            raise RequestInvalid(f"the deployment: expected at most {most} bytes as JSON, found {len(data)}.")
        try:
            self._store.put(ticket.key, data)
        except StoreUnavailable:
            self._doubtful[ticket.key] = None  # it may be there all the same
            raise
        return ticket

    def replace(self, ticket: Ticket, entry: JournalEntry) -> None:
        """Record what changed about a change, unless another builder has it. Not beside `remove` of it."""
        if self._holds([ticket]):
            self._store.put(ticket.key, entry.to_bytes())

    def remove(self, ticket: Ticket) -> None:
        """Forget a change that ended; may be repeated.

        Raises:
            TakenOver: others may have the change, which may end otherwise there.
            StoreUnavailable: it may still be there.
        """
        if ticket.key not in self._leaving:
            if self._is_late():
                raise StoreUnavailable(
                    f"{self._store.uri}: the builder could not show that it lives for a while."
                )
            lapses = self._lapses
            self.require([ticket])
            self._leaving[ticket.key] = lapses
        self._store.delete(ticket.key)
        if self._leaving.pop(ticket.key) != self._lapses or self._is_late():
            raise TakenOver

    def tidy(self) -> None:
        """Remove the entries that must not stay."""
        for key in tuple(self._doubtful):
            self._store.delete(key)
            del self._doubtful[key]

    def require(self, tickets: Collection[Ticket]) -> None:
        """Raise TakenOver unless all entries are there."""
        if not self._holds(tickets):
            raise TakenOver

    def _holds(self, tickets: Collection[Ticket]) -> bool:
        there = {ticket for name in {each.deployment for each in tickets} for ticket in self.queue(name)}
        return there.issuperset(tickets)

    def queue(self, deployment: str = "") -> list[Ticket]:
        """Return the entries of a deployment, or of all, in their order."""
        prefix = f"{BUILDS_PREFIX}{deployment}/" if deployment else BUILDS_PREFIX
        found = [ticket for key in self._store.list(prefix) if (ticket := Ticket.parse(key)) is not None]
        return sorted(found, key=lambda ticket: ticket.order)

    def runs(self) -> list[str]:
        """Return the runs that gave a sign of life, and were not ended."""
        return [match[1] for key in self._store.list(BUILDERS_PREFIX) if (match := _BEAT.fullmatch(key))]

    def beats(self) -> dict[str, bytes]:
        """Return the signs of life of all runs."""
        found = dict[str, bytes]()
        for run in self.runs():
            with suppress(ObjectMissing):
                found[run] = self._store.get(_beat_key(run))
        return found

    def is_ended(self, run: str) -> bool:
        """Return True for the earlier runs of this owner."""
        return run != self.run and run.partition(".")[0] == self._owner

    def read(self, copies: Iterable[Ticket]) -> dict[Ticket, JournalEntry]:
        """Return the entries of a change that are there and of this release; others are left where they are.

        Starts that failed have left several.

        Raises:
            StoreUnavailable
        """
        found = dict[Ticket, JournalEntry]()
        for ticket in copies:
            try:
                found[ticket] = JournalEntry.from_bytes(self._patient.get(ticket.key), what=ticket.key)
            except ObjectMissing:
                continue
            except BundleCorrupt as damage:
                why = damage.message
                log.warning("journal entry cannot be read, a release that can may take it", problem=why)
        return found

    def take(self, copies: Mapping[Ticket, JournalEntry]) -> tuple[Ticket, JournalEntry]:
        """Take over a change, of which runs that ended left these entries; return its own one.

        Raises:
            StoreUnavailable: it was not taken.
        """
        last = max(copies.values(), key=lambda entry: entry.attempt)
        cancelled = any(entry.cancelled for entry in copies.values())
        entry = last.model_copy(update={"attempt": last.attempt + 1, "cancelled": cancelled})
        taken = replace(next(iter(copies)), run=self.run)
        self._doubtful[taken.key] = None
        self._patient.put(taken.key, entry.to_bytes())
        del self._doubtful[taken.key]
        self._doubtful |= {ticket.key: None for ticket in copies}
        return taken, entry


def _beat_key(run: str) -> str:
    return f"{BUILDERS_PREFIX}{run}.json"
