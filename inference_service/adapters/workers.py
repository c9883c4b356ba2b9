"""Threads for work beside the steps, urgent work first."""

import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(order=True)
class _Work:
    """Something to do, ordered by urgency, then by arrival."""

    order: tuple[int, int]
    run: Callable[[], Any] | None = field(compare=False)
    """None ends the thread that takes it."""
    future: Future[Any] = field(compare=False, default_factory=Future)


class Workers:
    """A few threads that take work in turn, and end when this is closed or forgotten.

    They end with the process: a store that hangs delays no exit.
    """

    def __init__(self, name: str, count: int, prepare: Callable[[], object] | None = None) -> None:
        """Start the threads; each has run prepare when this returns. What one raises there is raised."""
        self._queue: queue.PriorityQueue[_Work] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._count = count
        self._lock = threading.Lock()
        self._closed = False
        ready, failures = threading.Barrier(count + 1), list[BaseException]()
        for number in range(count):
            arguments = self._queue, prepare, ready, failures
            threading.Thread(target=_serve, args=arguments, name=f"{name}-{number}", daemon=True).start()
        try:
            ready.wait()
        except threading.BrokenBarrierError:
            raise failures[0] from None
        weakref.finalize(self, _end, self._queue, count)

    def submit(self, work: Callable[[], T], *, urgent: bool = False) -> Future[T]:
        """Have a thread do it, urgent work before all that waits; what it raises is the future's.

        After `close`, the future is cancelled.
        """
        item = _Work((0 if urgent else 1, next(self._numbers)), work)
        with self._lock:
            if self._closed:
                item.future.cancel()
            else:
                self._queue.put(item)
        return item.future

    def close(self) -> None:
        """End each thread when its work is done; what waits is cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with suppress(queue.Empty):
                while True:
                    self._queue.get_nowait().future.cancel()
            _end(self._queue, self._count)


def _serve(
    work: queue.PriorityQueue[_Work],
    prepare: Callable[[], object] | None,
    ready: threading.Barrier,
    failures: list[BaseException],
) -> None:
    """Work as a thread; it knows nothing of the `Workers`, so that those can be forgotten."""
    try:
        if prepare is not None:
            prepare()
        ready.wait()
    except threading.BrokenBarrierError:
        return
    except BaseException as error:  # noqa: BLE001 - the maker of the threads gets it
        failures.append(error)
        ready.abort()
        return
    while (item := work.get()).run is not None:
        _carry_out(item)
        del item  # otherwise the item keeps its future's result alive until the next item


def _end(work: queue.PriorityQueue[_Work], count: int) -> None:
    for _ in range(count):
        work.put(_Work((-1, 0), None))


def _carry_out(item: _Work) -> None:
    if item.run is None or not item.future.set_running_or_notify_cancel():
        return
    try:
        result = item.run()
    except BaseException as error:  # noqa: BLE001 - the waiter of the future gets it
        item.future.set_exception(error)
    else:
        item.future.set_result(result)
