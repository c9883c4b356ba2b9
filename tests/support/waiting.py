"""Waits of tests: each ends with the event that it waits for, never with a clock.

``BOUND_S`` tells a test that hangs from one that waits: no machine that works is so slow. It is for everything
that demands a time-out: processes, threads, sockets, clients.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar

T = TypeVar("T")

BOUND_S: Final = 120.0
_PAUSE_S: Final = 0.005


def _nothing() -> object:
    return "not given"


def wait_until(true: Callable[[], T], what: str, state: Callable[[], object] = _nothing) -> T:
    """Return the first true value of ``true()``, or fail after ``BOUND_S`` with the ``state()`` then."""
    ends = time.monotonic() + BOUND_S
    while not (found := true()):
        assert time.monotonic() < ends, f"waited {BOUND_S:.0f} s for {what}; state: {state()}"
        time.sleep(_PAUSE_S)
    return found


async def until(true: Callable[[], T], what: str, state: Callable[[], object] = _nothing) -> T:
    """Return the first true value of ``true()`` as ``wait_until`` does; the event loop runs meanwhile."""
    ends = time.monotonic() + BOUND_S
    while not (found := true()):
        assert time.monotonic() < ends, f"waited {BOUND_S:.0f} s for {what}; state: {state()}"
        await asyncio.sleep(_PAUSE_S)
    return found


@asynccontextmanager
async def bounded(what: str, state: Callable[[], object] = _nothing) -> AsyncIterator[None]:
    """Bound the time of the awaited calls inside by ``BOUND_S``."""
    try:
        async with asyncio.timeout(BOUND_S) as timeout:
            yield
    except TimeoutError:
        assert not timeout.expired(), f"waited {BOUND_S:.0f} s for {what}; state: {state()}"
        raise


async def result_of(awaited: Awaitable[T], what: str, state: Callable[[], object] = _nothing) -> T:
    """Return the result of ``awaited``, or fail after ``BOUND_S``."""
    task = asyncio.ensure_future(awaited)
    done, _ = await asyncio.wait({task}, timeout=BOUND_S)
    assert done, f"waited {BOUND_S:.0f} s for {what}; state: {state()}"
    return task.result()


@contextmanager
def loop_in_thread() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """Run an event loop in a thread; yields a function that runs something in it and returns the result."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(BOUND_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(BOUND_S)
        assert not thread.is_alive(), "the loop does not end"
        loop.close()


@contextmanager
def in_thread(opening: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Open something in the event loop of a thread, for as long as the block takes."""
    with loop_in_thread() as do:
        value = do(opening.__aenter__())
        try:
            yield value
        finally:
            do(opening.__aexit__(None, None, None))


class Clock:
    """The time of the running event loop, which a test moves forward: timers of hours fire when it says so.

    Give what is under test an hour, and ``advance`` by one: however slow the machine is, nothing fires before.
    """

    def __init__(self) -> None:
        self._ahead_s = 0.0
        asyncio.get_running_loop().time = self._time  # type: ignore[method-assign]

    def _time(self) -> float:
        return time.monotonic() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """Let that much time pass for all timers of the loop."""
        self._ahead_s += seconds


class OwnTime:
    """A clock of its own: ``monkeypatch.setattr(module, "time", OwnTime())`` replaces the real one."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
