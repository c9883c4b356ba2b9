"""The gRPC server of both services: keys, faults as statuses, health, reflection, draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.access.guard import NOBODY_GUARDS, Guard
from shared.faults import Fault, InternalFault, SettingsInvalid, ShuttingDown
from shared.rpc.admission import AdmissionInterceptor
from shared.rpc.options import SERVER_OPTIONS
from shared.rpc.status import abort
from shared.rpc.tls import server_credentials
from shared.rpc.traced import traced
from shared.tracing.door import DoorSpans

log = structlog.get_logger()


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types here
    """Ends every call of our services once: with its answer, or with the status of a fault."""

    def __init__(self, tracing: DoorSpans | None = None) -> None:
        self._tracing = tracing
        self.draining = False
        self.active = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the handler of a call, unless it is health or reflection."""
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, details.method), **serializers
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, details.method), **serializers
        )

    def _unary(self, call: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def handler(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._guard(context, method):
                return await call(request, context)

        return handler

    def _stream(
        self, call: Callable[..., AsyncIterator[Any]], method: str
    ) -> Callable[..., AsyncIterator[Any]]:
        async def handler(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._guard(context, method):
                async for response in call(request, context):
                    yield response

        return handler

    @asynccontextmanager
    async def _guard(self, context: grpc.aio.ServicerContext, method: str) -> AsyncIterator[None]:
        """Count a call as open, trace it, and end it with a status where it raises."""
        self._enter()
        try:
            with traced(self._tracing, context, method):
                self._refuse_when_draining()
                yield
        except Fault as fault:
            await abort(context, fault)
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 - the last line: logged here, named INTERNAL to the caller
            await abort(context, _internal(method))
        finally:
            self._leave()

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise ShuttingDown(
                "the server is shutting down and takes no new calls. Retry with another replica."
            )

    def _enter(self) -> None:
        self.active += 1
        self.idle.clear()

    def _leave(self) -> None:
        self.active -= 1
        if not self.active:
            self.idle.set()


def _internal(method: str) -> InternalFault:
    log.exception("call failed", method=method)
    return InternalFault("loramux failed inside; the server's log has the details. Please report it.")


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
        tracing: DoorSpans | None = None,
    ) -> None:
        self.address = address
        self._tls = guard.tls
        self._interceptor = CallInterceptor(tracing)
        self._names = ("", *services)
        admission = [AdmissionInterceptor(guard.keyring)] if guard.keyring is not None else []
        interceptors = [*admission, self._interceptor]
        self._server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for register in services.values():
            register(self._server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Listen, and return the bound address (port 0 draws a free one).

        Raises:
            SettingsInvalid: the address is taken or no ``HOST:PORT``, or the files of TLS are no good.
        """
        await self.set_serving(False)
        host, _, port = self.address.rpartition(":")
        unix = host == "unix"
        try:
            bound = self._bind()
        except RuntimeError:
            bound = 0
        if not (bound and host and (unix or port.isdecimal())):
            raise SettingsInvalid(
                f"cannot listen on {self.address!r}: expected a free HOST:PORT of this machine. "
                "Stop what listens there, or choose another with --grpc."
            )
        await self._server.start()
        if not unix:
            self.address = f"{host}:{bound}"
        return self.address

    def _bind(self) -> int:
        if self._tls is None:
            return int(self._server.add_insecure_port(self.address))
        return int(self._server.add_secure_port(self.address, server_credentials(self._tls)))

    async def set_serving(self, ready: bool) -> None:
        """Set the health of every service."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, wait for the open ones, stop; False when the time ran out and calls were cut."""
        self._interceptor.draining = True
        await self._health.enter_graceful_shutdown()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._interceptor.idle.wait(), timeout_s)
        finished = self._interceptor.idle.is_set()
        if not finished:
            log.warning("drain timed out", open_calls=self._interceptor.active, timeout_s=timeout_s)
        # Those that arrive meanwhile are still told why they are refused; without any, nobody waits.
        await self._server.stop(grace=1.0 if finished else 0.1)
        return finished
