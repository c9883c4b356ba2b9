"""The HTTP server, in the event loop of the process."""

import socket
from collections.abc import Callable
from typing import Final

import structlog
import uvicorn
from uvicorn.server import ServerState

from inference_service.adapters.manager import AdapterManager
from inference_service.api.http.app import create_app
from inference_service.api.http.endpoint import Handler
from inference_service.api.http.wire.connections import Connections
from inference_service.api.http.wire.protocol import USUAL, BoundedHttp, ClientTimeouts
from inference_service.api.requests.service import GenerationService
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.process import connections_per_server
from loramux_shared.rpc.options import listen
from loramux_shared.tracing import Tracing

CUT_S: Final = 1.0
"""For what a drain cuts off to tell its client so, and for its connection to close."""

log = structlog.get_logger()


class HttpServer:
    """The HTTP server on an address ``HOST:PORT``."""

    def __init__(
        self,
        address: str,
        service: GenerationService,
        guard: Guard = NOBODY_GUARDS,
        tracing: Tracing | None = None,
        patience: ClientTimeouts = USUAL,
        max_connections: int | None = None,
        adapters: AdapterManager | None = None,
        relay: Handler | None = None,
    ) -> None:
        """Serve at most max_connections at once; what the limit on open files allows when not given."""
        self.address = address
        bound, hosts = max_connections or connections_per_server(), guard.hosts_at(address)
        self._front = create_app(service, guard.keyring, tracing, adapters, relay, bound, hosts)
        config = uvicorn.Config(
            self._front,
            log_config=None,
            log_level="critical",  # what a request raises is logged in `front`
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
        )
        config.load()
        state = ServerState()

        def connection() -> BoundedHttp:
            return BoundedHttp(
                config,
                state,
                {},
                patience=patience,
                refused=service.metrics.responded,
                leaving=lambda: self._front.leaving or self._front.draining,
            )

        tls = guard.tls.following_context() if guard.tls is not None else None
        self.connections = Connections(state, connection, patience, bound, tls)

    async def start(self, listener: socket.socket | None = None) -> str:
        """Listen, and return the bound address (port 0 draws a free one); a listener listens already. Raise
        SettingsInvalid where the address is taken or no ``HOST:PORT``.
        """
        host, _, _ = self.address.rpartition(":")
        listener = listener or listen(self.address)
        self.address = f"{host}:{listener.getsockname()[1]}"
        self.connections.start(listener)
        return self.address

    async def leave(self) -> None:
        """Answer health with 503 from now on, and still accept requests, the last of each connection."""
        self._front.leaving = True
        self.connections.announce()

    async def refuse(self) -> None:
        """Answer every new request, health included, with 503 from now on."""
        self._front.draining = True
        self.connections.drain()

    async def drain(self, timeout_s: float, cut: Callable[[], None] | None = None) -> bool:
        """Refuse new requests, wait for the open ones, stop; False when the time ran out and some were cut.

        `cut` ends the requests that others than the server can end, with a fault; the server cancels the rest.
        """
        await self.refuse()
        finished = await self._front.until_idle(timeout_s)
        if not finished:
            log.warning("drain timed out", open_requests=self._front.open, timeout_s=timeout_s)
            if cut is not None:
                cut()
            if cut is None or not await self._front.until_idle(CUT_S):
                self._front.cut()
                await self._front.until_idle(CUT_S)
        await self.connections.close(CUT_S)
        return finished
