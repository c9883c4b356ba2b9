"""Signs of life of this builder, and the builds of those that give none any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from builder_service.builds.journal import Abandoned, Journal, JournalEntry
from builder_service.builds.limits import BuildLimits
from loramux_shared.faults import StoreUnavailable

log = structlog.get_logger()


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
