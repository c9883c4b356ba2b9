"""Signs of life of this builder, and the builds of those that give none any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from builder_service.builds.journal import Abandoned, Journal, JournalEntry
from loramux_shared.faults import StoreUnavailable


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
