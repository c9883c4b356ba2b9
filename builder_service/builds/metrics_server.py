"""``/metrics`` of the builder over HTTP, for few clients that are quick."""

from __future__ import annotations

import contextlib
import socket
import threading
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

MAX_CLIENTS: Final = 16
"""At once; one more is closed unheard."""
LIMIT_S: Final = 10.0
"""Seconds from a connection to the end of its answer."""


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Answers every client on a thread; prometheus_client's own server bounds neither threads nor time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, registry: CollectorRegistry, limit_s: float = LIMIT_S) -> None:
        """Listen; port 0 draws a free one.

        Raises:
            OSError: the address is taken or none of this machine.
        """
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._limit_s = limit_s
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__((host, port), _Silent)
        self.set_app(make_wsgi_app(registry))

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a client a thread, where there is a place."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a client within the time."""
        clock = threading.Timer(self._limit_s, _end, (request,))
        clock.daemon = True
        clock.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            clock.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients go away."""


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Leave the log to the service."""


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
