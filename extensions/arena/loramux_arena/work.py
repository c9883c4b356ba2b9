"""Requests through a server's limits: as many at once as it takes, and none is lost because it was busy."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

from loramux_shared.faults import ClientStalled, Fault, QueueFull, RateLimited, Status

GROWTH: Final = 2.0
"""Factor of a pause at each further refusal of a request."""
SPREAD: Final = 0.25
"""Random share that is added to a pause, so that not all requests come back at once."""

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Patience:
    """The time that a server may be full or unreachable, and the pauses between retries."""

    away_s: float = 60.0
    """While no request ends: the server is away, or restarts."""
    full_s: float = 900.0
    """While no request ends: the server is busy with others."""
    least_pause_s: float = 0.25
    most_pause_s: float = 15.0

    def left(self, fault: Fault, since_s: float) -> bool:
        """Return True if the request is to be retried, since_s after a request ended last."""
        return since_s <= (self.full_s if is_full(fault) else self.away_s)

    def pause_s(self, fault: Fault, tries: int) -> float:
        """Return how long to wait: the server's own delay, and longer each time while it is unreachable.

        A server without room has a narrower gate already; longer waits would leave it idle at the end.
        """
        grown = min(self.least_pause_s * (1.0 if is_full(fault) else GROWTH**tries), self.most_pause_s)
        spread = 1 + SPREAD * random.random()  # noqa: S311 - times, not keys
        return max(fault.retry_after_s or 0.0, grown) * spread


class Gate:
    """The number of open requests: bounded, halved after a refusal, raised by one after each round."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._open = 0
        self._freed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        async with self._freed:
            await self._freed.wait_for(lambda: self._open < int(self.limit))
            self._open += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open -= 1
        async with self._freed:
            self._freed.notify_all()

    def answered(self) -> None:
        """Widen it a little: additive increase, multiplicative decrease, as TCP has it (RFC 5681)."""
        self.limit = min(self.limit + 1 / self.limit, float(self.most))

    def refused(self) -> None:
        """Halve it; refusals of requests that were open together count once, as half of them are still open."""
        if self._open >= self.limit / 2:
            self.limit = max(1.0, self.limit / 2)


class Work(Generic[J, R]):
    """Does jobs in their order, many at once.

    What a busy or absent server refuses is asked again, after the pause that it names; any other fault is the
    job's outcome.
    """

    def __init__(self, do: Callable[[J], Awaitable[R]], concurrency: int, patience: Patience) -> None:
        self._do = do
        self._patience = patience
        self._gate = Gate(concurrency)
        self._concurrency = concurrency
        self._alive = time.monotonic()
        """When a job ended last."""
        self.waits = 0
        """Number of refusals for a while."""

    async def run(self, jobs: Iterable[J], tell: Callable[[J, R | Fault], None]) -> None:
        """Do all jobs; tell is called with each and its outcome.

        Raises:
            Fault: the server is away, or busy with others, for longer than the arena waits; jobs are left.
        """
        self._alive = time.monotonic()
        left = iter(jobs)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(self._worker(left, tell))
        except ExceptionGroup as group_error:
            faults, others = group_error.split(Fault)
            if faults is None or others is not None:
                raise
            first = faults.exceptions[0]
            raise first from None

    async def _worker(self, jobs: Iterator[J], tell: Callable[[J, R | Fault], None]) -> None:
        for job in jobs:
            outcome = await self._outcome(job)
            self._alive = time.monotonic()
            tell(job, outcome)

    async def _outcome(self, job: J) -> R | Fault:
        tries = 0
        while True:
            try:
                async with self._gate:
                    done = await self._do(job)
            except Fault as fault:
                if not is_passing(fault):
                    return fault
                if not self._patience.left(fault, time.monotonic() - self._alive):
                    raise
                if is_full(fault):
                    self._gate.refused()
                self.waits += 1
                await asyncio.sleep(self._patience.pause_s(fault, tries))
                tries += 1
            else:
                self._gate.answered()
                return done


def is_full(fault: Fault) -> bool:
    """Return True if the server has no room for the request now."""
    return isinstance(fault, QueueFull | RateLimited)


def is_passing(fault: Fault) -> bool:
    """Return True if the same request may be answered a while later."""
    return is_full(fault) or isinstance(fault, ClientStalled) or fault.status is Status.UNAVAILABLE
