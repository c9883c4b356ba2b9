"""Commands for the engine's thread, run between two steps."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable

Command = Callable[[], None]


class Inbox:
    """Commands in the order in which they came; any thread may post."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def post(self, command: Command) -> None:
        """Have something done on the thread that receives."""
        self._commands.put(command)

    def close(self) -> None:
        """Let the thread end when it has done what was posted before."""
        self._commands.put(None)

    def receive(self, wait_s: float = math.inf) -> bool:
        """Do what was posted, or is within so many seconds; True when the thread is to end."""
        try:
            command = self._next(wait_s)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return False
        return True

    def _next(self, wait_s: float) -> Command | None:
        if wait_s <= 0:
            return self._commands.get_nowait()
        return self._commands.get(timeout=min(wait_s, threading.TIMEOUT_MAX))
