"""Word of what happened to deployments, for those that follow them. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class News:
    """Wakes those that listen for a deployment."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def listen(self, name: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set at each word of a deployment; the listener clears it."""
        event = asyncio.Event()
        self._listeners.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            self._listeners[name].discard(event)
            if not self._listeners[name]:
                del self._listeners[name]

    def tell(self, name: str) -> None:
        """Say that something happened to a deployment."""
        for event in self._listeners.get(name, ()):
            event.set()

    def tell_all(self) -> None:
        """Say that something happened to all."""
        for name in tuple(self._listeners):
            self.tell(name)
