"""The interceptor of every call of our services: its request in time, the drain, a trace, and one end."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError

from loramux_shared.arrival import ARRIVED_S
from loramux_shared.faults import ClientStalled, Fault, InternalFault, RequestInvalid, ShuttingDown
from loramux_shared.rpc.status import Context, abort
from loramux_shared.rpc.wire import bounded
from loramux_shared.tracing import Tracing

CUT: Final = "the server shut down before the call was complete. Retry with another replica."
DRAIN_SEND_S: Final = 1.0
"""For the rest of a request once the server drains."""

LINGER_S: Final = 2.0
LINGER_BYTES: Final = 256 << 20
"""Bytes of an upload that are still read after it was refused."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Patience:
    """The seconds that a client may take, and those in which a drained server still answers."""

    send_s: float = 60.0
    """Seconds from a call's begin to the end of its request, or of the first message of a stream."""
    pause_s: float = 30.0
    """Seconds from one message to the next of a stream that the client sends."""
    read_s: float = 30.0
    """To make room for a message of an answer."""
    quiet_s: float = 0.1
    """Seconds without a call, behind a refused one, after which a drained server stops."""
    parting_s: float = 1.0
    """Seconds that a drained server refuses calls by name at the most."""


USUAL: Final = Patience()


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types here
    """Ends every call of our services once: with its answer, or with the status of a fault."""

    def __init__(self, tracing: Tracing | None = None, patience: Patience = USUAL) -> None:
        self._tracing = tracing
        self._patience = patience
        self.draining = False
        self._refused_s = -math.inf
        """When a call was refused because of that."""
        self._open: set[asyncio.Task[Any]] = set()
        self._reading: set[asyncio.Timeout] = set()
        self._writing: dict[asyncio.Task[Any], tuple[asyncio.Timeout, float]] = {}
        """Since when a message waits for its client to make room."""
        self._looking = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Calls that were let in and have not ended."""
        return len(self._open)

    def drain(self) -> None:
        """Refuse new calls, and wait no longer for the rest of requests."""
        self.draining = True
        soon = asyncio.get_running_loop().time() + DRAIN_SEND_S
        for limit in self._reading:
            if not limit.expired():  # in this turn of the loop, and its call has not heard yet
                limit.reschedule(soon)

    async def until_idle(self, timeout_s: float) -> bool:
        """Wait until no call is open; False when the time ran out."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    async def until_quiet(self) -> None:
        """Wait until clients that still come have heard that they are to go, but not for long.

        gRPC ends calls that come while it stops with CANCELLED, which says nothing.
        """
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._patience.parting_s
        while (now := loop.time()) < (until := min(latest, self._refused_s + self._patience.quiet_s)):
            await asyncio.sleep(until - now)

    def cut(self) -> None:
        """End what is open with SHUTTING_DOWN, behind messages on their way; new calls are refused already."""
        for task in self._open:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the handler of a call, unless it is health or reflection."""
        ARRIVED_S.set(time.monotonic())  # a call is a task, so the variable needs no reset
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        return self.wrap(handler, details.method)

    def wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        """Return a handler that passes here what it does.

        Requests are one message, but are taken as streams: else gRPC waits for the message before it calls us,
        for as long as the client likes. Of a method that wants a stream, each message has to come in time.
        """
        serializers = {
            "request_deserializer": handler.request_deserializer and bounded(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method), **serializers
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._upload(handler.stream_unary, method), **serializers
            )
        return grpc.stream_unary_rpc_method_handler(self._unary(handler.unary_unary, method), **serializers)

    def _unary(self, call: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def handler(_requests: Any, context: Context) -> Any:
            async with self._guard(context, method):
                return await call(await self._read(context), context)

        return handler

    def _upload(self, call: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def handler(_requests: Any, context: Context) -> Any:
            async with self._guard(context, method):
                try:
                    return await call(self._messages(context), context)
                except Fault as fault:
                    if not self.draining and not isinstance(fault, ClientStalled):
                        await _linger(context)
                    raise

        return handler

    async def _messages(self, context: Context) -> AsyncIterator[Any]:
        limit_s, late = self._patience.send_s, "the request did not arrive"
        while (message := await self._next(context, limit_s, late)) is not grpc.aio.EOF:
            yield message
            limit_s, late = self._patience.pause_s, "the client sent nothing more of the request"

    def _stream(self, call: Callable[..., AsyncGenerator[Any]], method: str) -> Callable[..., Awaitable[None]]:
        async def handler(_requests: Any, context: Context) -> None:
            loop = asyncio.get_running_loop()
            async with (
                self._guard(context, method) as task,
                self._patient(task) as limit,
                aclosing(call(await self._read(context), context)) as responses,
            ):
                begun = False
                async for response in responses:
                    if not begun:  # otherwise no status can follow a message that the client does not read
                        await context.send_initial_metadata(())
                        begun = True
                    self._writing[task] = limit, loop.time()
                    await context.write(response)
                    self._writing.pop(task, None)

        return handler

    async def _read(self, context: Context) -> Any:
        request = await self._next(context, self._patience.send_s, "the request did not arrive")
        if request is grpc.aio.EOF:
            raise RequestInvalid("the call has no request; expected one message.")
        return request

    async def _next(self, context: Context, limit_s: float, late: str) -> Any:
        try:
            async with asyncio.timeout(limit_s) as limit:
                self._reading.add(limit)
                try:
                    return await context.read()
                finally:
                    self._reading.discard(limit)
        except TimeoutError:
            self._refuse_when_draining()
            raise ClientStalled(f"{late} within {limit_s:g} s. Send it again without pauses.") from None
        except DecodeError:
            raise RequestInvalid("the request is not a message of this method.") from None

    @asynccontextmanager
    async def _patient(self, task: asyncio.Task[Any]) -> AsyncIterator[asyncio.Timeout]:
        """End a call one of whose messages waits too long; a timer for each would be a tenth of its cost."""
        self._look()
        try:
            async with asyncio.timeout(None) as limit:
                yield limit
        except TimeoutError:
            if not limit.expired():
                raise
            raise ClientStalled(
                f"the client read nothing of the answer for {self._patience.read_s:g} s; it was ended."
            ) from None
        finally:
            self._writing.pop(task, None)

    def _look(self) -> None:
        """Look at what is written, again and again while calls are open."""
        if self._looking:
            return
        loop = asyncio.get_running_loop()
        late_s = loop.time() - self._patience.read_s
        for task in [task for task, (_, since_s) in self._writing.items() if since_s <= late_s]:
            limit, _ = self._writing.pop(task)
            limit.reschedule(loop.time())
        if self._open:
            self._looking = True
            loop.call_later(min(1.0, self._patience.read_s / 4), self._look_again)

    def _look_again(self) -> None:
        self._looking = False
        self._look()

    def _traced(self, context: Context, method: str) -> AbstractContextManager[None]:
        if self._tracing is None:
            return nullcontext()
        return self._tracing.of_call(dict(context.invocation_metadata()), method)

    @asynccontextmanager
    async def _guard(self, context: Context, method: str) -> AsyncIterator[asyncio.Task[Any]]:
        """Count a call as open, trace it, and end it with a status where it raises."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        try:
            with self._traced(context, method):
                self._refuse_when_draining()  # a drain does not wait for calls that are refused at once
                self._open.add(task)
                self._idle.clear()
                yield task
        except Fault as fault:
            if isinstance(fault, ClientStalled):
                self._leave(task)  # the status waits behind a message that the client may never read
            await abort(context, fault)
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            if not self.draining or context.cancelled():
                raise
            task.uncancel()
            await abort(context, ShuttingDown(CUT))
        except Exception:  # noqa: BLE001 - the last line: logged here, named INTERNAL to the caller
            await abort(context, _internal(method))
        finally:
            self._leave(task)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            self._refused_s = asyncio.get_running_loop().time()
            raise ShuttingDown(
                "the server is shutting down and takes no new calls. Retry with another replica."
            )

    def _leave(self, task: asyncio.Task[Any]) -> None:
        self._open.discard(task)
        if not self._open:
            self._idle.set()


async def _linger(context: Context) -> None:
    """Read on for a moment: a client that is cut off while it sends may hear nothing of why."""
    left = LINGER_BYTES
    with suppress(TimeoutError, DecodeError, RequestInvalid):
        async with asyncio.timeout(LINGER_S):
            while left > 0 and (message := await context.read()) is not grpc.aio.EOF:
                left -= message.ByteSize()


def _internal(method: str) -> InternalFault:
    log.exception("call failed: unexpected error", method=method)
    return InternalFault("internal error; the server's log has the details. Please report it.")
