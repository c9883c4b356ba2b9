"""The gRPC server of both services: keys and scopes, faults as statuses, health, reflection, draining."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loramux_shared import routes
from loramux_shared.access.guard import NOBODY_GUARDS, Guard, TlsFiles
from loramux_shared.access.keyring import Keyring, bearer
from loramux_shared.access.keys import ACCESS, Scope
from loramux_shared.faults import Fault, PermissionDenied, Unauthenticated
from loramux_shared.process import READY, STOPPING, connections_per_server, notify
from loramux_shared.rpc.calls import USUAL, CallInterceptor, Patience
from loramux_shared.rpc.options import cannot_listen, require_free, server_options
from loramux_shared.rpc.status import abort
from loramux_shared.tracing import Tracing
from loramux_shared.wording import is_whole

HEALTH_CALLS: Final = f"/{health.SERVICE_NAME}/"
"""How the paths of calls begin that need no key."""


class AdmissionInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types here
    """Refuses a call whose key is missing, unknown or of another scope, before its request is read."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Let a call in, with the rights of its key, or end it."""
        if details.method.startswith(HEALTH_CALLS):
            return await continuation(details)
        service = details.method.removeprefix("/").rpartition("/")[0]
        scope = routes.SCOPES.get(service, Scope.ADMIN)
        headers = [value for name, value in details.invocation_metadata if name == "authorization"]
        try:
            access = self._keyring.authorize(bearer(headers), scope)
        except (Unauthenticated, PermissionDenied) as fault:
            return _refusal(fault)
        ACCESS.set(access)  # a call is a task, so the variable needs no reset
        return await continuation(details)


def _refusal(fault: Fault) -> grpc.RpcMethodHandler:
    # A handler of streams: it need not read the request, whatever the method is.
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await abort(context, fault)
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)


CUT_S: Final = 1.0
"""For what a drain cuts off to tell its client so."""

log = structlog.get_logger()


class RpcServer:
    """A grpc.aio server.

    services maps full names (``loramux.builder.v1.BuilderService``) to functions that register a servicer.
    Health is NOT_SERVING for each of them, and for the server as a whole (``""``), until `set_serving`.
    """

    def __init__(
        self,
        address: str,
        services: Mapping[str, Callable[[grpc.aio.Server], None]],
        guard: Guard = NOBODY_GUARDS,
        tracing: Tracing | None = None,
        patience: Patience = USUAL,
        max_connections: int | None = None,
        relay: grpc.GenericRpcHandler | None = None,
    ) -> None:
        """Take at most max_connections at once; what the limit on open files allows when not given.

        With a relay, which has the first word about each call, other processes may listen on the same port.
        """
        self.address = address
        self._shared = relay is not None
        self._tls = guard.tls
        self.calls = CallInterceptor(tracing, patience)
        self._names = ("", *services)
        self._bound = False
        admission = [AdmissionInterceptor(guard.keyring)] if guard.keyring is not None else []
        interceptors = [*admission, self.calls]
        options = server_options(max_connections or connections_per_server(), shared=self._shared)
        self._server = grpc.aio.server(interceptors=interceptors, options=options)
        if relay is not None:
            self._server.add_generic_rpc_handlers((relay,))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for register in services.values():
            register(self._server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def bind(self) -> None:
        """Take the address, of which port 0 draws a free one; calls wait until `start`.

        Raises:
            SettingsInvalid: the address is taken or no ``HOST:PORT``, or the files of TLS are no good.
        """
        if not self._shared:
            require_free(self.address)
        host, _, port = self.address.rpartition(":")
        unix = host == "unix"
        try:
            bound = self._bind()
        except RuntimeError:
            bound = 0
        if not (bound and host and (unix or is_whole(port))):
            raise cannot_listen(self.address, "gRPC could not bind it")
        if not unix:
            self.address = f"{host}:{bound}"
        self._bound = True

    async def start(self) -> str:
        """Listen, and return the bound address; raise SettingsInvalid as `bind` does."""
        await self.set_serving(False)
        if not self._bound:
            self.bind()
        await self._server.start()
        return self.address

    def _bind(self) -> int:
        if self._tls is None:
            return int(self._server.add_insecure_port(self.address))
        return int(self._server.add_secure_port(self.address, server_credentials(self._tls)))

    async def set_serving(self, ready: bool) -> None:
        """Set the health of every service, and notify the process that started this one that it is ready."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)
        if ready:
            notify(READY)

    async def leave(self) -> None:
        """Report NOT_SERVING from now on, and still accept calls."""
        notify(STOPPING)
        await self.set_serving(False)

    async def refuse(self) -> None:
        """Take no new calls, and be NOT_SERVING from now on."""
        self.calls.drain()
        notify(STOPPING)
        await self._health.enter_graceful_shutdown()

    async def drain(self, timeout_s: float, cut: Callable[[], None] | None = None) -> bool:
        """Refuse new calls, wait for the open ones, stop; False when the time ran out and calls were cut.

        `cut` ends the calls that others than the server can end, with a fault; the server cancels the rest.
        """
        await self.refuse()
        finished = await self.calls.until_idle(timeout_s)
        if not finished:
            log.warning("drain timed out", open_calls=self.calls.active, timeout_s=timeout_s)
            if cut is not None:
                cut()
            if cut is None or not await self.calls.until_idle(CUT_S):
                self.calls.cut()
                await self.calls.until_idle(CUT_S)
        await self.calls.until_quiet()
        # Calls that arrive meanwhile still get the reason of their refusal; an idle server stops sooner.
        await self._server.stop(grace=1.0 if finished else 0.1)
        return finished


def server_credentials(files: TlsFiles) -> Any:
    """Return credentials whose handshakes use the files as they are then; broken files are not taken. Raise
    SettingsInvalid where they are broken now.
    """
    read = partial(_configuration, files)
    renewed = files.follow(read)
    return grpc.dynamic_ssl_server_credentials(read(), renewed, files.client_ca is not None)


def _configuration(files: TlsFiles) -> Any:
    pem = files.pem()
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=pem.client_ca)
