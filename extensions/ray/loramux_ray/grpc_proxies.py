"""Our gRPC services in Ray's own gRPC proxies, in place of its handlers for them.

Ray's handlers know no deadline, send no details of a status, and put stack traces into INTERNAL. Its proxy
calls `add_services` with its server, which is one of grpc.aio; ours are added past the override that would make
them Ray's. They are counted where Ray counts its own, so that a proxy that drains waits for them. Both are no
public interface of Ray, which is why its version is bounded.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, Final, NoReturn

import grpc
from grpc.aio._server import Server as PlainServer
from grpc_health.v1 import health_pb2_grpc

from loramux.builder.v1 import builder_pb2_grpc
from loramux.inference.v1 import adapters_pb2_grpc, inference_pb2_grpc
from loramux_ray.bridge import Handlers, Register
from loramux_ray.calls import End, RpcCall, host_of
from loramux_ray.forwarding import LOST, ONCE, PAUSES_S, Forwarder
from loramux_ray.health import Health
from loramux_ray.names import APP, BUILDER, BUILDER_APP, ENGINE, MODEL
from loramux_shared.faults import InternalFault, RequestInvalid
from loramux_shared.routes import BUILDER_SERVICE, INFERENCE_SERVICE
from loramux_shared.rpc.calls import CallInterceptor
from loramux_shared.rpc.options import MAX_REQUEST_BYTES

APPLICATION: Final = "application"
"""Ray's metadata that names an application."""
RETRIED: Final = f"/{INFERENCE_SERVICE}/"
"""Calls that may be made twice."""


def add_services(_servicer: object, server: Any) -> None:
    """Add our services to the server of a proxy of Ray's; the first argument of Ray's stands for nothing."""
    services = ProxyServices(server.service_handler_factory.__self__)
    PlainServer.add_generic_rpc_handlers(server, (services,))


class ProxyServices(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types here
    """The services of one proxy."""

    def __init__(self, proxy: Any) -> None:
        """Stand in a proxy of Ray's, which counts calls and knows whether it drains."""
        self._proxy = proxy
        self._calls = CallInterceptor()
        self._engines: dict[str, Forwarder] = {}
        self._builder = Forwarder(BUILDER, BUILDER_APP)
        health = Health(lambda: not proxy._is_draining())
        self._handlers: Mapping[str, grpc.RpcMethodHandler] = {
            **{name: self._forwarding(name, each) for name, each in _ours().items()},
            **Handlers([partial(health_pb2_grpc.add_HealthServicer_to_server, health)]).found,
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a method, where it is one of ours."""
        return self._handlers.get(details.method)

    def _forwarding(self, method: str, known: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        parse = {"request_deserializer": known.request_deserializer}
        if known.response_streaming:
            handler = grpc.unary_stream_rpc_method_handler(partial(self._stream, method), **parse)
        elif known.request_streaming:
            handler = grpc.stream_unary_rpc_method_handler(partial(self._upload, method), **parse)
        else:
            handler = grpc.unary_unary_rpc_method_handler(partial(self._unary, method), **parse)
        return self._calls.wrap(handler, method)

    async def _stream(
        self, method: str, request: Any, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[bytes]:
        forwarder = await self._forwarder(method, context)
        key = "" if forwarder is self._builder else await forwarder.key(_model(request, context))
        pauses_s = PAUSES_S if method.startswith(RETRIED) else ONCE
        data = request.SerializeToString()
        if len(data) > MAX_REQUEST_BYTES:  # Ray's servers take 2 GB
            raise RequestInvalid(f"the request is larger than {MAX_REQUEST_BYTES} bytes.")
        call = _call(method, data, context)
        parts = forwarder.stream("rpc", call, key=key, pauses_s=pauses_s, elsewhere=_elsewhere)
        with counted(self._proxy):
            async with aclosing(parts):
                async for part in parts:
                    if isinstance(part, End):
                        await _end(context, part)
                    for message in part:
                        yield message

    async def _unary(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> bytes:
        async with aclosing(self._stream(method, request, context)) as messages:
            async for message in messages:
                return message
        raise InternalFault(LOST)

    async def _upload(
        self, method: str, messages: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> bytes:
        """Hand message after message to the call that reads them, which may end before the last one."""
        name = uuid.uuid4().hex
        parts = self._builder.stream("rpc", _call(method, b"", context, name), pauses_s=ONCE)
        with counted(self._proxy):
            async with aclosing(parts):
                await anext(parts)  # the receiver reads
                sending = asyncio.create_task(self._send(name, messages))
                try:
                    async for part in parts:
                        if isinstance(part, End):
                            await _end(context, part)
                        return b"".join(part)
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
        raise InternalFault(LOST)

    async def _send(self, upload: str, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            async for taken in self._builder.stream("send", upload, message.SerializeToString(), pauses_s=ONCE):
                if not taken:
                    return
        async for _ in self._builder.stream("send", upload, None, pauses_s=ONCE):
            pass

    async def _forwarder(self, method: str, context: grpc.aio.ServicerContext) -> Forwarder:
        if method.startswith(f"/{BUILDER_SERVICE}/"):
            return self._builder
        app = str(dict(context.invocation_metadata() or ()).get(APPLICATION, APP))
        known = self._engines.get(app)
        if known is None:
            known = Forwarder(ENGINE, app)
            await known.open()  # applications that are not there are not remembered
            self._engines[app] = known
        return known


@contextmanager
def counted(proxy: Any) -> Iterator[None]:
    """Count a call as one that a proxy of Ray's waits for before it ends."""
    proxy._ongoing_requests_start()
    try:
        yield
    finally:
        proxy._ongoing_requests_end()


def _ours() -> dict[str, grpc.RpcMethodHandler]:
    """Return what is known of our methods: how their messages are read, and which are streams."""
    register: list[Register] = [
        partial(
            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            inference_pb2_grpc.InferenceServiceServicer(),
        ),
        partial(
            adapters_pb2_grpc.add_AdapterServiceServicer_to_server, adapters_pb2_grpc.AdapterServiceServicer()
        ),
        partial(
            builder_pb2_grpc.add_BuilderServiceServicer_to_server, builder_pb2_grpc.BuilderServiceServicer()
        ),
    ]
    return Handlers(register).found


def _call(method: str, request: bytes, context: grpc.aio.ServicerContext, upload: str = "") -> RpcCall:
    metadata = tuple((str(name), value) for name, value in context.invocation_metadata() or ())
    return RpcCall(method, request, metadata, context.time_remaining(), host_of(context.peer()), upload)


def _model(request: Any, context: grpc.aio.ServicerContext) -> str:
    """Return the model, or for operators the adapter, that a call is about."""
    named = getattr(request, "model", "") or getattr(request, "name", "")
    return str(named or dict(context.invocation_metadata() or ()).get(MODEL, ""))


def _elsewhere(part: list[bytes] | End) -> bool:
    return isinstance(part, End) and part.elsewhere


async def _end(context: grpc.aio.ServicerContext, end: End) -> NoReturn:
    codes = {code.value[0]: code for code in grpc.StatusCode}
    context.set_trailing_metadata(tuple(end.trailing))
    await context.abort(codes[end.code], end.details)
    raise AssertionError("abort returned")
