"""Output that a terminal shows only while something takes long."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Final, Protocol, Self

AFTER_S: Final = 0.3
"""Seconds before it is shown; something shorter would flash, and nobody could read it."""


class Shown(Protocol):
    """A spinner or bars of rich."""

    def start(self) -> None:
        """Begin to draw."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


class Later:
    """Shows something once the block has taken a while; a block that is over before is never seen."""

    def __init__(self, shown: Shown, after_s: float = AFTER_S) -> None:
        self._shown = shown
        self._lock = threading.Lock()
        self._timer = threading.Timer(after_s, self._start)
        self._timer.daemon = True
        self._ended = self._started = False

    def _start(self) -> None:
        with self._lock:
            if not self._ended:
                self._started = True
                self._shown.start()

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._started:
                self._shown.stop()
