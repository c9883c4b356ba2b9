"""Calls that an API process hands to the engine's process as they are: those that read no prompt."""

from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from typing import Any, Final

import grpc
from grpc_health.v1 import health
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.api.http.wire.body import read_bytes
from inference_service.api.http.wire.refusals import REQUEST_ID
from inference_service.api.processes import messages
from inference_service.api.processes.channel import Channel
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from loramux_shared.access.keys import ACCESS
from loramux_shared.rpc.options import CLIENT_OPTIONS

ANSWERED: Final = frozenset(f"/{SERVICE_NAME}/{method}" for method in ("Generate", "Embed", "Classify"))
"""Calls that an API process answers itself, as it does those about its health."""
OWN_METADATA: Final = ("user-agent", "content-type", "te")
"""Names that a client writes itself, as it does those that begin with ``grpc-``."""


class HttpRelay:
    """Has the engine's process answer a request."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def __call__(self, service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG002
        """Hand a request over, and return its answer."""
        scope = {name: http.scope[name] for name in ("method", "path", "query_string", "headers")}
        body, rights = await read_bytes(http), messages.access_to(ACCESS.get())
        status, headers, answer = await self._channel.ask(
            "http", scope, body, rights, http.scope["state"][REQUEST_ID]
        )
        response = Response(answer, status)
        response.raw_headers = [(bytes(name), bytes(value)) for name, value in headers]
        return response


class RpcRelay(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types here
    """Passes calls on to the engine's own server without reading them.

    Requests are one message, except those for reflection: a call that ends while its client writes a stream has
    the status of the write instead of its own.
    """

    def __init__(self, address: str, servicer: InferenceServicer) -> None:
        self._channel = grpc.aio.insecure_channel(address, CLIENT_OPTIONS)
        own = _Handlers()
        servicer.register(own)
        self._own = own.handlers

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return what passes a call on, or the handler of one that is answered here."""
        method = details.method
        if method in ANSWERED:
            return next(handler.service(details) for handler in self._own)
        if method.startswith(f"/{health.SERVICE_NAME}/"):
            return None

        streams = method.startswith("/grpc.")
        begin = self._channel.stream_stream(method) if streams else self._channel.unary_stream(method)

        async def relay(
            request: AsyncIterator[bytes] | bytes, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[bytes]:
            call = begin(
                request, timeout=context.time_remaining(), metadata=_passed(context.invocation_metadata())
            )
            try:
                async for message in call:
                    yield message
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))
            finally:
                call.cancel()

        if streams:
            return grpc.stream_stream_rpc_method_handler(relay)
        return grpc.unary_stream_rpc_method_handler(relay)

    async def close(self) -> None:
        """Close the connection to the engine's process."""
        with suppress(grpc.RpcError):
            await self._channel.close()


class _Handlers:
    """A stand-in for a server that a servicer is registered with."""

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Collection[grpc.GenericRpcHandler]) -> None:
        """Keep the handlers."""
        self.handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Do without: they are the same by another way."""


def _passed(metadata: Collection[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value) for name, value in metadata if name not in OWN_METADATA and not name.startswith("grpc-")
    )
