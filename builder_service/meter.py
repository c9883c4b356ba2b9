"""Metrics of the builder, for Prometheus, over HTTP: for few clients that are quick."""

import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)

from builder_service.builds.running import RunningBuild
from builder_service.builds.views import BuildState
from loramux_shared.access.guard import is_local
from loramux_shared.access.hosts import require_own
from loramux_shared.bounded_server import BoundedHttpServer
from loramux_shared.faults import HostRefused, SettingsInvalid

MAX_CLIENTS: Final = 16
"""Clients at once; above it the oldest one leaves."""
LIMIT_S: Final = 10.0
"""Seconds from a connection to the end of its answer."""


class MetricsServer(BoundedHttpServer, WSGIServer):
    """Answers every client on a thread; prometheus_client's own server bounds neither threads nor time."""

    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        hosts: Collection[str] | None = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen; port 0 draws a free one. hosts are the server's names beside loopback's; None: any.

        Raises:
            OSError: the address is taken or none of this machine.
        """
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Silent, max_connections=MAX_CLIENTS, limit_s=LIMIT_S, clock=clock)
        app = make_wsgi_app(registry)
        self.set_app(app if hosts is None else _named(app, hosts))

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients go away."""


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Leave the log to the service."""


def _named(app: WSGIApplication, hosts: Collection[str]) -> WSGIApplication:
    """Return an application that refuses requests to other names, and from pages of other sites."""

    def checked(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            for header in ("host", "origin"):
                require_own(hosts, header, environ.get(f"HTTP_{header.upper()}", ""))
        except HostRefused as fault:
            start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
            return [fault.message.encode()]
        return app(environ, start_response)

    return checked


BUCKETS: Final = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
"""Bounds of the buckets, in seconds."""
INTERRUPTED: Final = "INTERRUPTED"
"""Outcome of a build that continues at the next start; other outcomes are OK and the reasons of faults."""

# These metrics double the series of counters, and no dashboard reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class BuildMeter:
    """Counts builds; no label has a deployment's or an adapter's name."""

    def __init__(self, running: Callable[[], int]) -> None:
        """Count nothing yet; running tells how many builds are under way, on any thread."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._builds = Counter("loramux_builds", "Builds that ended.", ["outcome"], registry=self._registry)
        self._seconds = Histogram(
            "loramux_build_seconds",
            "Time of a build from acceptance to end.",
            registry=self._registry,
            buckets=BUCKETS,
        )
        gauge = Gauge("loramux_builds_running", "Builds that run or wait for a slot.", registry=self._registry)
        gauge.set_function(running)

    def ended(self, build: RunningBuild) -> None:
        """Count a build."""
        outcome = (
            build.failure.reason if build.failure else "OK" if build.state is BuildState.ACTIVE else INTERRUPTED
        )
        self._builds.labels(outcome).inc()
        self._seconds.observe((datetime.now(UTC) - build.entry.create_time).total_seconds())

    def listen(self, address: str, *, insecure: bool, hosts: Collection[str] | None = ()) -> str:
        """Answer ``/metrics`` at an address from now on, under loopback's names and these, or any; returns the
        bound address.

        Raises:
            SettingsInvalid: it is taken, a Unix socket, or reached from elsewhere and nobody said `insecure`.
        """
        host, _, port = address.rpartition(":")
        if address.startswith("unix:") or not (insecure or is_local(address)):
            raise SettingsInvalid(
                f"LORAMUX_METRICS={address}: metrics require no key, so expected a loopback HOST:PORT, "
                "or LORAMUX_INSECURE=1, too."
            )
        try:
            server = MetricsServer(host.strip("[]"), int(port), self._registry, hosts=hosts)
        except OSError as error:
            raise SettingsInvalid(f"LORAMUX_METRICS={address}: {error}; expected a free HOST:PORT.") from error
        server.start()
        return f"{host}:{server.server_port}"
