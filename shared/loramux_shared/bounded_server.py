"""An HTTP server of the standard library whose threads are bounded, and the time of its connections."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class BoundedHttpServer(ThreadingHTTPServer):
    """Answers each connection on a thread; for few clients that are quick.

    A connection has its time from its beginning to its end, however its bytes drip in. Where all places are
    taken, the oldest connection leaves for the new one, so silent clients keep nobody out.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        *,
        max_connections: int,
        limit_s: float,
        listening: socket.socket | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen at an address, or take a socket that listens there.

        Raises:
            OSError: the address is taken or none of this machine.
        """
        self._places = threading.BoundedSemaphore(max_connections)
        self._limit_s = limit_s
        self._clock = clock
        self._open: dict[socket.socket, float] = {}
        """Ends of the time of connections, the oldest first."""
        self._opening = threading.Lock()
        super().__init__(address, handler, bind_and_activate=listening is None)
        if listening is not None:
            self.socket.close()
            self.socket = listening

    @property
    def connections(self) -> int:
        """Return the number of connections that are open."""
        return len(self._open)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread; where there is none left, the oldest connection ends first."""
        if not self._places.acquire(blocking=False):
            with self._opening:
                _cut(*list(self._open)[:1])
            self._places.acquire()
        with self._opening:
            self._open[request] = self._clock() + self._limit_s
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection whose thread ends."""
        with self._opening:
            known = self._open.pop(request, None) is not None
        super().shutdown_request(request)
        if known:
            self._places.release()

    def service_actions(self) -> None:
        """End connections whose time is over; called about twice a second."""
        now = self._clock()
        with self._opening:
            _cut(*(request for request, end_s in self._open.items() if end_s <= now))


def _cut(*connections: socket.socket) -> None:
    """Let reads and writes of connections end; their threads close them."""
    for each in connections:
        with suppress(OSError):  # the client was first
            each.shutdown(socket.SHUT_RDWR)
