"""Watches that what a thread does ends in time."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final, Self

import structlog

FRAMES: Final = 8
"""Frames of the stack that is logged, the innermost."""

log = structlog.get_logger()


class Watchdog:
    """Calls late once, on a thread of its own, when one `with` block has lasted longer than limit_s.

    A call that keeps the interpreter's lock for good stops this thread too: then only a health check without an
    answer shows it.
    """

    def __init__(
        self, limit_s: float, late: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s = limit_s
        self._late = late
        self._clock = clock
        self._watched = 0
        self._since_s: float | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Watch the calling thread until `stop`."""
        self._watched = threading.get_ident()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()

    def __enter__(self) -> Self:
        """Begin what is to end in time."""
        self._since_s = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._since_s = None

    def look(self) -> bool:
        """Call late and return True where the block under way has lasted too long."""
        since_s = self._since_s
        if since_s is None or self._clock() - since_s <= self._limit_s:
            return False
        log.critical("engine step exceeds its time limit", limit_s=self._limit_s, where=self._where())
        self._late()
        return True

    def _run(self) -> None:
        while not self._ended.wait(min(1.0, self._limit_s / 4)) and not self.look():
            pass

    def _where(self) -> list[str]:
        frame = sys._current_frames().get(self._watched)  # the documented way to another thread's stack
        summary = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
        return [f"{entry.filename}:{entry.lineno} {entry.name}" for entry in summary]
