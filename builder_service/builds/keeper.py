"""A builder's signs of life, and its look at the queues of builders that give none."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Final

import structlog

from builder_service.builds.journal import Journal, JournalEntry, Ticket
from loramux_shared.bundle.deployments import newest_or_none, point_at_highest, settle
from loramux_shared.faults import Fault, StoreUnavailable
from loramux_shared.storage.base import Store

log = structlog.get_logger()

WATCH_S: Final = 3600.0
"""Time to watch a deployment that was taken over: a builder that stood still may put an old pointer."""


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
    """Between two signs of life of the builder."""
    lease_s: float = 90
    """Seconds without a sign of life after which another builder takes a builder's changes over."""


class Abandoned:
    """Finds runs that give no signs of life. It compares what it saw itself: clocks of others do not matter."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, tuple[bytes, float]] = {}

    def among(self, runs: Collection[str], beats: Mapping[str, bytes], now_s: float) -> set[str]:
        """Return the runs without a sign of life for a lease: without any, or with the one of a lease ago."""
        before, self._seen = self._seen, {}
        for run, beat in beats.items():
            same = run in before and before[run][0] == beat
            self._seen[run] = before[run] if same else (beat, now_s)
        living = {run for run, (_, since_s) in self._seen.items() if now_s - since_s < self._lease_s}
        return set(runs) - living


class Keeper:
    """Two tasks: one gives signs of life, the other takes over what builders leave that give none."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        limits: BuildLimits,
        take_up: Callable[[Ticket, JournalEntry], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Call take_up with each entry that became one of this builder."""
        self._store = store
        self._journal = journal
        self._beat_s = limits.beat_s
        self._abandoned = Abandoned(limits.lease_s)
        self._take_up = take_up
        self._clock = clock
        self._beating = ThreadPoolExecutor(1, "heartbeat")
        self._watched: dict[str, float] = {}
        """Deployments to look after, each with the time until when."""
        self.left: frozenset[Ticket] = frozenset()
        """Entries of dead builders that cannot be read: no change waits for them."""

    async def recover(self) -> int:
        """Begin to live, and take up what earlier runs of this owner left; returns how many changes."""
        await asyncio.to_thread(self._journal.beat)
        tickets = await asyncio.to_thread(self._journal.queue)
        changes = _by_change(ticket for ticket in tickets if self._journal.is_ended(ticket.run))
        taken = [len(copies) > len(await self._take(copies)) for copies in changes]
        with suppress(StoreUnavailable):  # it is done later
            await asyncio.to_thread(self._journal.tidy)
            for run in await asyncio.to_thread(self._journal.runs):
                if self._journal.is_ended(run):
                    await asyncio.to_thread(self._journal.end_run, run)
        return sum(taken)

    async def beat(self) -> None:
        """Give signs of life until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                await loop.run_in_executor(self._beating, self._journal.beat)
            except StoreUnavailable as fault:
                log.warning("heartbeat failed: the store does not answer", problem=fault.message)

    async def look(self) -> None:
        """Look after the queues until it is cancelled."""
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                await self.look_once()
            except Fault as fault:
                log.warning("journal could not be looked through", reason=fault.reason, problem=fault.message)

    async def look_once(self) -> None:
        """Take over the entries of builders that died, and let the newest generation of theirs be served."""
        await asyncio.to_thread(self._journal.tidy)
        tickets = await asyncio.to_thread(self._journal.queue)  # before the signs of life, which come first
        beats = await asyncio.to_thread(self._journal.beats)
        runs = {ticket.run for ticket in tickets} | beats.keys()
        dead = self._abandoned.among(runs - {self._journal.run}, beats, self._clock())
        abandoned = {ticket: None for ticket in tickets if ticket.run in dead}
        new = [ticket for ticket in abandoned if ticket not in self.left]
        for name in dict.fromkeys(ticket.deployment for ticket in new):
            await asyncio.to_thread(settle, self._store, name)
            self._watched[name] = self._clock() + WATCH_S
        left = [await self._take(copies) for copies in _by_change(new)]
        self.left = frozenset(chain(*left, self.left & abandoned.keys()))
        await asyncio.to_thread(self._journal.tidy)
        for run in dead & beats.keys() - {ticket.run for ticket in self.left}:
            await asyncio.to_thread(self._journal.end_run, run)
        await self._serve_newest()

    async def _serve_newest(self) -> None:
        for name, until in tuple(self._watched.items()):
            newest = await asyncio.to_thread(newest_or_none, self._store, name)
            if newest is not None:
                await asyncio.to_thread(point_at_highest, self._store, newest)
            if self._clock() > until:
                del self._watched[name]

    async def _take(self, copies: Collection[Ticket]) -> Collection[Ticket]:
        """Take over a change from the entries that ended runs left of it; return those that cannot be read."""
        entries = await asyncio.to_thread(self._journal.read, copies)
        if entries:
            await self._take_up(*await asyncio.to_thread(self._journal.take, entries))
            with suppress(StoreUnavailable):  # it is done later
                await asyncio.to_thread(self._journal.tidy)  # not before: it keeps back the changes behind it
        return set(copies) - entries.keys()

    def close(self) -> None:
        """End the thread of the heartbeat."""
        self._beating.shutdown(wait=False)


def _by_change(tickets: Iterable[Ticket]) -> Collection[Collection[Ticket]]:
    """Return the entries of each change, in the order of the first ones."""
    found = defaultdict[Hashable, list[Ticket]](list)
    for ticket in tickets:
        found[ticket.deployment, ticket.order].append(ticket)
    return found.values()
