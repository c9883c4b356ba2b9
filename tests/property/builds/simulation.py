"""Several builders on one store, one thread at a time: the order of requests, faults and deaths is drawn.

The event loop has a clock of its own. What it runs in threads goes on by one request to the store at a time, so
that a seed gives the same history each time.
"""

import asyncio
import random
import selectors
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from loramux_shared.faults import StoreUnavailable
from loramux_shared.storage.memory import MemoryStore
from tests.support.stores.killed import Killed, StoreProxy
from tests.support.waiting import BOUND_S

T = TypeVar("T")

REQUEST_S: Final = 0.02
"""Time that a request to the store takes."""


class TimedStore(MemoryStore):
    """A store with the clock of a simulation."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def put(self, key: str, data: bytes | Path) -> None:
        super().put(key, data)
        self.modified[key] = datetime.fromtimestamp(self._clock(), UTC)


@dataclass
class Host:
    """The machine of one builder, which can stand still or die."""

    dead: bool = False
    still_until: float = 0.0


class _Worker(threading.Thread):
    """A call in a thread, which goes on when the simulation lets it."""

    def __init__(self, work: Callable[[], object], future: asyncio.Future[Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.future = work, future
        self.go, self.parked = threading.Semaphore(0), threading.Semaphore(0)
        self.host: Host | None = None
        self.wake_at = 0.0
        self.end: tuple[object, BaseException | None] | None = None

    def run(self) -> None:
        _HERE.worker = self
        assert self.go.acquire(timeout=BOUND_S)
        try:
            self.end = self.work(), None
        except BaseException as error:  # noqa: BLE001 - it is the future's
            self.end = None, error
        self.parked.release()

    def park(self, host: Host | None, wake_at: float = 0.0) -> None:
        self.host, self.wake_at = host, wake_at
        self.parked.release()
        assert self.go.acquire(timeout=BOUND_S)


_HERE = threading.local()


class Simulation(asyncio.SelectorEventLoop):
    """An event loop whose time passes when nothing else can happen."""

    def __init__(self, seed: int) -> None:
        self.now, self.draw = 1e6, random.Random(seed)
        self.faults = 0.0
        """Share of requests that fail."""
        self.after_step: Callable[[], object] = lambda: None
        """Called after each request."""
        self._workers: list[_Worker] = []
        super().__init__(_Steps(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> Any:  # noqa: ARG002
        """Begin a call in a thread."""
        future = self.create_future()
        worker = _Worker(lambda: func(*args), future)
        worker.start()
        self._workers.append(worker)
        return future

    def step(self, timeout: float | None) -> None:
        """Let a drawn worker go on to its next request, or let time pass until something can happen."""
        if timeout == 0:
            return
        able = [each for each in self._workers if self._ready_at(each) <= self.now]
        if not able:
            ends = [self.now + timeout] if timeout is not None else []
            times = [*ends, *map(self._ready_at, self._workers)]
            assert times, "nothing can happen any more"
            self.now = max(self.now, min(times))
            return
        worker = self.draw.choice(able)
        worker.go.release()
        assert worker.parked.acquire(timeout=BOUND_S)
        self.now += REQUEST_S
        self.after_step()
        if worker.end is not None:
            self._workers.remove(worker)
            worker.join()
            result, error = worker.end
            if worker.future.cancelled():
                return
            if error is None:
                worker.future.set_result(result)
            else:
                worker.future.set_exception(error)

    @staticmethod
    def _ready_at(worker: _Worker) -> float:
        still = worker.host.still_until if worker.host is not None and not worker.host.dead else 0.0
        return max(worker.wake_at, still)

    def sleep(self, seconds: float) -> None:
        """Stand for time.sleep in threads of the simulation."""
        if (worker := getattr(_HERE, "worker", None)) is not None:
            worker.park(None, self.now + seconds)

    def monotonic(self) -> float:
        """Stand for time.monotonic."""
        return self.now

    def uniform(self, low: float, high: float) -> float:
        """Stand for random.uniform."""
        return self.draw.uniform(low, high)

    def token_hex(self, count: int) -> str:
        """Stand for secrets.token_hex."""
        return self.draw.randbytes(count).hex()


class _Steps(selectors.SelectSelector):
    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def select(self, timeout: float | None = None) -> Any:
        self._simulation.step(timeout)
        return super().select(0)


@dataclass
class HostStore(StoreProxy):
    """The store as one builder reaches it: a request has its turn, and may fail before or after it acts."""

    simulation: Simulation
    host: Host
    store: MemoryStore
    uri: str = field(default="memory://")

    def act(self, operation: Callable[[], T]) -> T:
        draw, worker = self.simulation.draw, getattr(_HERE, "worker", None)
        if worker is not None:
            worker.park(self.host)
        if self.host.dead:
            raise Killed
        if worker is None or draw.random() >= self.simulation.faults:
            return operation()
        if draw.random() < 0.5:
            operation()
        raise StoreUnavailable("the store did not answer")
