"""SIGTERM and SIGINT: while a service starts they end it at once, afterwards it drains."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import structlog

log = structlog.get_logger()

T = TypeVar("T")


class DrainingServer(Protocol):
    """A server that can report that it is about to close."""

    async def leave(self) -> None:
        """Report NOT_SERVING to health checks, and still serve."""
        ...


async def leave(
    servers: Collection[DrainingServer], delay_s: float, sooner: Coroutine[Any, Any, object] | None = None
) -> None:
    """Give proxies time to turn away before anything is refused; it is over when sooner ends."""
    if delay_s:
        log.info("waiting before the drain", delay_s=delay_s)
        for server in servers:
            await server.leave()
    waits: list[Coroutine[Any, Any, object]] = [asyncio.sleep(delay_s), *([sooner] if sooner else [])]
    await first_of(*waits)


async def first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them ends, and cancel the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def shielded(awaited: Awaitable[T]) -> T:
    """Return the result of what goes on when its caller leaves; no log then reports its failure.

    asyncio.shield leaves the failure to the log: "exception was never retrieved", or "in shielded future".
    """
    work = asyncio.ensure_future(awaited)
    if not work.done():
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait((work,))
    return work.result()


async def wait_at_most(seconds: float, event: asyncio.Event) -> None:
    """Wait until an event is set, for so many seconds at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def supervise(name: str, work: Callable[[], Awaitable[None]], pause_s: float = 5.0) -> None:
    """Run what a service needs for as long as it lives: after a defect it begins again, and the log says so."""
    while True:
        try:
            return await work()
        except Exception:  # any defect: without the task the service would only seem to work
            log.exception("background task failed, beginning again", task=name, pause_s=pause_s)
        await asyncio.sleep(pause_s)


class Stop:
    """The first signal since this was made, on the running event loop; a second one kills as usual."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received: asyncio.Future[signal.Signals] = self._loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)

    async def starting(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what a start returns; a signal meanwhile ends the process with 128 and its number.

        Nobody was promised anything yet, and threads that wait for a network would be waited for.
        """
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._received}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            number = self._received.result()
            log.info("stopped before the server was ready", signal=number.name)
            sys.stderr.flush()
            os._exit(128 + number)
        return task.result()

    async def wait(self) -> signal.Signals:
        """Return the signal, once there is one."""
        return await self._received

    async def wait_beside(self, work: Coroutine[Any, Any, object]) -> signal.Signals | None:
        """Return the signal, once there is one; None when work ends before."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._received}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        return self._received.result() if self._received.done() else None

    def _on_signal(self, number: signal.Signals) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(each)
        if not self._received.done():  # a second signal may come before the loop has run
            self._received.set_result(number)
