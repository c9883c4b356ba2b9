"""The wake-ups of an event loop by gRPC."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final

MOST: Final = 4096
"""Wake-ups that are taken at once."""


def take_wakeups_together() -> None:
    """Have gRPC's events handled together in the running loop, which must be the only one of its process.

    gRPC's thread writes a byte for each event. A turn of the loop reads one byte and then handles all events: a
    server of many streams made an empty turn for each message. The other bytes are taken here once their events
    were handled: behind an exception they are still there for events that were not.
    """
    loop = asyncio.get_running_loop()
    add = loop.add_reader

    def add_reader(source: Any, callback: Callable[..., object], *args: Any) -> None:
        owner = getattr(getattr(callback, "func", callback), "__self__", None)
        if not (isinstance(source, socket.socket) and type(owner).__module__.startswith("grpc")):
            add(source, callback, *args)
            return

        def handle() -> None:
            waiting = len(source.recv(MOST, socket.MSG_PEEK))
            callback(*args)
            if waiting > 1:
                source.recv(waiting - 1)

        add(source, handle)

    loop.add_reader = add_reader  # type: ignore[assignment,method-assign]
