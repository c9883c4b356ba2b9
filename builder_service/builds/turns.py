"""Builds of one deployment follow each other; changes that wait meanwhile are made together, as one generation.

Lives on the event loop.
"""

import asyncio
from bisect import insort
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import structlog

from builder_service.builds.journal import Order, TakenOver
from builder_service.builds.running import RunningBuild
from builder_service.pipeline.build import BuildResult
from loramux_shared.bundle.deployments import PartlyApplied
from loramux_shared.faults import BuildInterrupted, BuildTimedOut, Fault, InternalFault, StoreUnavailable
from loramux_shared.rpc.stopping import wait_at_most

log = structlog.get_logger()

Group: TypeAlias = Sequence[RunningBuild]
OF_ALL: Final = (BuildInterrupted, BuildTimedOut, InternalFault, StoreUnavailable)
"""Faults that a smaller group would meet too."""
MAX_ATTEMPTS: Final = 3
"""Starts of the builder that one build may outlive; then it is given up, for it may be what kills it."""
UNEXPECTED: Final = "internal error; the builder's log has the details. Please report it."
FOREIGN_POLL_S: Final = 1.0
"""Between two looks at a change of another builder that comes first."""


@dataclass
class _Queue:
    """The builds of a deployment that have not begun, each with its result to come."""

    waiting: list[RunningBuild] = field(default_factory=list)
    """Builds in the order of the journal."""
    halves: list[Group] = field(default_factory=list)
    """Groups that failed together and are tried apart; the next one is last."""
    results: dict[RunningBuild, asyncio.Future[BuildResult]] = field(default_factory=dict)

    def next_group(self, foreign: Order) -> Group:
        """Take the builds of the next turn: the first, and others that come before another builder's change."""
        group = [self.waiting.pop(0)]
        touched = set(_touched(group[0]))
        while self.waiting and self.waiting[0].ticket.order < foreign and _may_join(group[0], self.waiting[0]):
            if not touched.isdisjoint(_touched(self.waiting[0])):
                break
            touched |= _touched(self.waiting[0])
            group.append(self.waiting.pop(0))
        return group


class Turns:
    """Gives each build its turn."""

    def __init__(
        self,
        make: Callable[[Group], Awaitable[BuildResult]],
        first_foreign: Callable[[str], Awaitable[Order]],
    ) -> None:
        """Run groups of builds of one deployment by make, each as one change.

        first_foreign returns the place of the first change of a deployment that other builders have.
        """
        self._make = make
        self._first_foreign = first_foreign
        self._queues: dict[str, _Queue] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def result(self, running: RunningBuild) -> BuildResult:
        """Wait for the turn of a build and return what it published, alone or together with others.

        Raises:
            Fault: why this build failed; no failure of another build of its group is one of it.
            TakenOver: another builder has it now.
        """
        queue = self._queues.get(running.name)
        if queue is None:
            queue = self._queues[running.name] = _Queue()
            task = asyncio.create_task(self._serve(running.name, queue), name=f"turns of {running.name}")
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        queue.results[running] = result = asyncio.Future[BuildResult]()
        insort(queue.waiting, running, key=lambda each: each.ticket.order)
        return await result

    async def _serve(self, name: str, queue: _Queue) -> None:
        while queue.waiting or queue.halves:
            group: Group = queue.halves.pop() if queue.halves else ()
            try:
                group = group or await self._next_group(name, queue)
                result = await self._make(group)
            except BaseException as error:  # noqa: BLE001 - each build of the group ends with it
                if len(group) > 1 and _is_of_one(error):
                    middle = len(group) // 2
                    queue.halves += [group[middle:], group[:middle]]
                    continue
                for running in group or [queue.waiting.pop(0)]:
                    queue.results.pop(running).set_exception(_fault_of(error))
            else:
                for running in group:
                    queue.results.pop(running).set_result(result)
        del self._queues[name]

    async def _next_group(self, name: str, queue: _Queue) -> Group:
        """Wait until no other builder's change comes first; a build that is to end need not wait."""
        while True:
            foreign, first = await self._first_foreign(name), queue.waiting[0]
            # Two builders may have taken over one change: then both try it, and the second finds it published.
            if first.ticket.order <= foreign or first.stopping.is_set():
                return queue.next_group(foreign)
            await wait_at_most(FOREIGN_POLL_S, first.stopping)


def _fault_of(error: BaseException) -> BaseException:
    """Return the error with which one build of a group ends."""
    if isinstance(error, Fault):
        return error.copy()
    if isinstance(error, TakenOver) or not isinstance(error, Exception):
        return error
    log.error("build failed: unexpected error", exc_info=error)
    return InternalFault(UNEXPECTED)


def _is_of_one(error: BaseException) -> bool:
    """Return True for what a smaller group may be spared."""
    return isinstance(error, TakenOver | PartlyApplied | Fault) and not isinstance(error, OF_ALL)


def _touched(running: RunningBuild) -> frozenset[str]:
    return running.entry.update.touched if running.entry.update else frozenset()


def _may_join(one: RunningBuild, other: RunningBuild) -> bool:
    """Return True if two builds can be one change, as far as they touch different adapters.

    A change that expects a generation follows that one alone; so does, at its last attempt, a change that the
    builder may have been killed by.
    """
    if (first := one.entry.update) is None or (second := other.entry.update) is None:
        return False
    alone = any(running.entry.cancelled or running.entry.attempt >= MAX_ATTEMPTS for running in (one, other))
    expected = {first.expected_generation, second.expected_generation}
    same = first.must_be_new == second.must_be_new and one.entry.attempt == other.entry.attempt
    return same and not alone and expected == {None}
