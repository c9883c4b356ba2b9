"""Builders of one store that take turns: each of their operations waits until the test lets it happen."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from tests.support.stores.killed import Killed, StoreProxy
from tests.support.waiting import BOUND_S

T = TypeVar("T")


class TurnStore(StoreProxy):
    """A store for one builder, whose every operation waits for its turn."""

    def __init__(self, store: MemoryStore, dies_at: int | None = None) -> None:
        super().__init__(store)
        self.dies_at = dies_at
        self.count = 0
        self.go = threading.Semaphore(0)
        self.parked = threading.Semaphore(0)

    def act(self, operation: Callable[[], T]) -> T:
        self.parked.release()
        assert self.go.acquire(timeout=BOUND_S)
        self.count += 1
        if self.dies_at is not None and self.count > self.dies_at:
            raise Killed
        return operation()


class Race(Generic[T]):
    """Builders that do one thing each, one operation at a time, in an order that the test says."""

    def __init__(
        self,
        store: MemoryStore,
        works: Sequence[Callable[[Store], T]],
        after_each: Callable[[], object],
        dies_at: int | None = None,
    ) -> None:
        """Run the works; with dies_at the first of them is killed after so many operations."""
        self.store, self.after_each = store, after_each
        self.pool = ThreadPoolExecutor(len(works))
        self.turns = [TurnStore(store, dies_at if i == 0 else None) for i in range(len(works))]
        self.results: list[Future[T | None]] = [
            self.pool.submit(self._do, turns, work) for turns, work in zip(self.turns, works, strict=True)
        ]
        for turns in self.turns:
            assert turns.parked.acquire(timeout=BOUND_S)

    def _do(self, turns: TurnStore, work: Callable[[Store], T]) -> T | None:
        try:
            return work(turns)
        except Killed:
            return None
        finally:
            turns.parked.release()

    def step(self, i: int) -> bool:
        """Let one builder do one operation; False when it has ended."""
        if self.results[i].done():
            return False
        self.turns[i].go.release()
        assert self.turns[i].parked.acquire(timeout=BOUND_S)
        return True

    def run(self, schedule: Sequence[tuple[int, int]]) -> list[T | None]:
        """Let builders do as many operations as the schedule says, then all to their ends; None: killed."""
        for i, operations in schedule:
            for _ in range(operations):
                if not self.step(i):
                    break
                self.after_each()
        left, stretches = set(range(len(self.turns))), random.Random(0)
        while left:  # in turn: one may wait for another's claim
            for i in sorted(left, reverse=True):
                # Uneven, as the pauses of builders are: one operation each would keep those that met in step.
                for _ in range(stretches.randint(1, 8)):
                    if not self.step(i):
                        left.discard(i)
                        break
                    self.after_each()
        self.pool.shutdown()
        return [result.result() for result in self.results]
