"""The gRPC services inside a replica.

A call that Ray's proxies hand on passes what it would pass in our server.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import grpc

from loramux_ray.calls import End, RpcCall, require_local
from loramux_ray.context import CallContext, Uploads
from loramux_shared.access.guard import Guard
from loramux_shared.faults import PermissionDenied
from loramux_shared.rpc.calls import CallInterceptor
from loramux_shared.rpc.server import AdmissionInterceptor
from loramux_shared.rpc.status import abort
from loramux_shared.tracing import Tracing

Register = Callable[[Any], None]
"""Adds a servicer to what it takes for a server."""


class Handlers:
    """Stands where generated code expects a server, and keeps what it registers."""

    def __init__(self, register: Sequence[Register]) -> None:
        self.found: dict[str, grpc.RpcMethodHandler] = {}
        for each in register:
            each(self)

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Take no notice: these are the same ones, for servers of older releases."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        """Keep the handlers of a service."""
        self.found |= {f"/{service}/{name}": handler for name, handler in handlers.items()}


class Bridge:
    """The services of a replica."""

    def __init__(
        self, register: Sequence[Register], guard: Guard, tracing: Tracing | None, *, insecure: bool
    ) -> None:
        """Answer this machine alone where no key is required, unless `insecure` is set."""
        self._handlers = Handlers(register).found
        self._calls = CallInterceptor(tracing)
        self._admission = AdmissionInterceptor(guard.keyring) if guard.keyring is not None else None
        self._local_only = guard.keyring is None and not insecure

    async def run(self, call: RpcCall, uploads: Uploads | None = None) -> AsyncGenerator[list[bytes] | End]:
        """Yield the parts of an answer, of which the first comes with the first token."""
        context = CallContext(call, uploads)
        task = asyncio.create_task(self._answer(call, context))
        try:
            async for part in context.parts():
                yield part
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _answer(self, call: RpcCall, context: CallContext) -> None:
        try:
            await self._run(await self._handler(call, context), context)
        except grpc.aio.AbortError:
            pass  # the status is reported
        finally:
            context.close()

    async def _run(self, handler: grpc.RpcMethodHandler, context: CallContext) -> None:
        context.use(handler)
        if not handler.response_streaming:
            await context.write(await handler.stream_unary(None, context))
            return
        answer = handler.stream_stream(None, context)
        if not inspect.isasyncgen(answer):
            await answer
            return
        async for message in answer:
            await context.write(message)

    async def _handler(self, call: RpcCall, context: CallContext) -> grpc.RpcMethodHandler:
        if self._local_only:
            try:
                require_local(call.peer)
            except PermissionDenied as fault:
                await abort(context, fault)

        async def known(_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return self._handlers.get(call.method)

        async def wrapped(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return await self._calls.intercept_service(known, details)

        if self._admission is None:
            handler = await wrapped(context)
        else:
            handler = await self._admission.intercept_service(wrapped, context)
        if handler is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{call.method[:200]} is not served here.")
        return handler
