"""The HTTP server, in the event loop of the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import structlog
import uvicorn

from inference_service.openai_api.app import create_app
from inference_service.openai_api.protocol import BoundedHttp
from inference_service.serving.service import GenerationService
from shared.access.guard import NOBODY_GUARDS, Guard
from shared.faults import SettingsInvalid
from shared.tracing.door import DoorSpans

KEEP_ALIVE_S = 65
"""Longer than clients and load balancers keep idle connections, so that they close them first."""
CUT_S = 1

log = structlog.get_logger()


class HttpServer:
    """The door on an address ``HOST:PORT``."""

    def __init__(
        self,
        address: str,
        service: GenerationService,
        guard: Guard = NOBODY_GUARDS,
        tracing: DoorSpans | None = None,
    ) -> None:
        self.address = address
        self._front = create_app(service, guard.keyring, tracing)
        config = uvicorn.Config(
            self._front,
            http=BoundedHttp,
            log_config=None,
            log_level="critical",  # what a request raises is logged in `front`
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CUT_S,
        )
        config.load()
        if guard.tls is not None:
            config.ssl = guard.tls.following_context()
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen, and return the bound address (port 0 draws a free one).

        Raises:
            SettingsInvalid: the address is taken or no ``HOST:PORT``.
        """
        host, _, _ = self.address.rpartition(":")
        listener = _listen(self.address)
        self._task = asyncio.create_task(self._server.serve([listener]))
        await self._server.listening.wait()
        self.address = f"{host}:{listener.getsockname()[1]}"
        return self.address

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, wait for the open ones, stop; False when the time ran out and some were cut."""
        self._front.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._front.idle.wait(), timeout_s)
        finished = self._front.idle.is_set()
        if not finished:
            log.warning("drain timed out", open_requests=self._front.open, timeout_s=timeout_s)
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        return finished


class _Server(uvicorn.Server):
    """Leaves signals to the process, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self.listening.set()


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, int(port)), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, ValueError) as error:
        raise SettingsInvalid(
            f"cannot listen on {address!r} ({error}): expected a free HOST:PORT of this machine. "
            "Stop what listens there, or choose another with --http."
        ) from error
