"""Builds of one deployment follow each other; changes that wait meanwhile are made together, as one generation.

Lives on the event loop.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from builder_service.builds.running import RunningBuild
from builder_service.pipeline.build import BuildResult
from loramux_shared.faults import BuildInterrupted, BuildTimedOut, Fault, InternalFault, StoreUnavailable

Group: TypeAlias = Sequence[RunningBuild]
OF_ALL: Final = (BuildInterrupted, BuildTimedOut, InternalFault, StoreUnavailable)
"""Faults that a smaller group would meet too."""
MAX_ATTEMPTS: Final = 3
"""Starts of the builder that one build may outlive; then it is given up, for it may be what kills it."""


@dataclass
class _Queue:
    """The builds of a deployment that have not begun, each with its result to come."""

    waiting: deque[RunningBuild] = field(default_factory=deque)
    halves: list[Group] = field(default_factory=list)
    """Groups that failed together and are tried apart; the next one is last."""
    results: dict[RunningBuild, asyncio.Future[BuildResult]] = field(default_factory=dict)

    def next_group(self) -> Group:
        """Take the builds of the next turn, in the order in which they were accepted."""
        if self.halves:
            return self.halves.pop()
        group = [self.waiting.popleft()]
        touched = set(_touched(group[0]))
        while self.waiting and _may_join(group[0], self.waiting[0]):
            if not touched.isdisjoint(_touched(self.waiting[0])):
                break
            touched |= _touched(self.waiting[0])
            group.append(self.waiting.popleft())
        return group


class Turns:
    """Gives each build its turn; make runs a group of builds of one deployment, which is one change."""

    def __init__(self, make: Callable[[Group], Awaitable[BuildResult]]) -> None:
        self._make = make
        self._queues: dict[str, _Queue] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def result(self, running: RunningBuild) -> BuildResult:
        """Wait for the turn of a build and return what it published, alone or together with others.

        Raises:
            Fault: why this build failed; no failure of another build of its group is one of it.
        """
        queue = self._queues.get(running.name)
        if queue is None:
            queue = self._queues[running.name] = _Queue()
            task = asyncio.create_task(self._serve(running.name, queue), name=f"turns of {running.name}")
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        queue.results[running] = result = asyncio.Future[BuildResult]()
        queue.waiting.append(running)
        return await result

    async def _serve(self, name: str, queue: _Queue) -> None:
        while queue.waiting or queue.halves:
            group = queue.next_group()
            try:
                result = await self._make(group)
            except BaseException as error:  # noqa: BLE001 - each build of the group ends with it
                if len(group) > 1 and isinstance(error, Fault) and not isinstance(error, OF_ALL):
                    middle = len(group) // 2
                    queue.halves += [group[middle:], group[:middle]]
                    continue
                for running in group:
                    own = error.copy() if isinstance(error, Fault) else error
                    queue.results.pop(running).set_exception(own)
            else:
                for running in group:
                    queue.results.pop(running).set_result(result)
        del self._queues[name]


def _touched(running: RunningBuild) -> frozenset[str]:
    return running.entry.update.touched if running.entry.update else frozenset()


def _may_join(one: RunningBuild, other: RunningBuild) -> bool:
    """True when two builds can be one change, as far as they touch different adapters.

    A change that expects a generation follows that one alone; so does, at its last attempt, a change that the
    builder may have been killed by.
    """
    if (first := one.entry.update) is None or (second := other.entry.update) is None:
        return False
    alone = any(running.entry.cancelled or running.entry.attempt >= MAX_ATTEMPTS for running in (one, other))
    expected = {first.expected_generation, second.expected_generation}
    same = first.must_be_new == second.must_be_new and one.entry.attempt == other.entry.attempt
    return same and not alone and expected == {None}
