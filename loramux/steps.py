"""One core for both clients: a method's calls are written once, and each client waits in its own way.

A method of the core is a generator: it yields each `Ask`, and is sent the answer. `blocking` makes a method for
threads of it, and `awaited` one for asyncio. A method that streams returns a `Stream`, for `iterated` and
`async_iterated`.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeAlias, TypeVar

import grpc

from loramux.connection import named
from loramux_shared.rpc.status import CallFailed

P = ParamSpec("P")
T = TypeVar("T")
Service: TypeAlias = Literal["inference", "adapters", "builder"]


@dataclass(frozen=True)
class Ask:
    """A call whose answer is one message."""

    service: Service
    method: str
    request: Any
    """A message, or an iterator of messages that may read files."""
    timeout_s: float | None


@dataclass(frozen=True)
class Stream(Generic[T]):
    """A call whose answer is a stream; yielded by a method of the core, it is answered with all records."""

    service: Service
    method: str
    request: Any
    timeout_s: float | None
    decode: Callable[[Any], T | None]
    """Returns None for a message that is no record."""


Steps: TypeAlias = Generator[Ask | Stream[Any], Any, T]


class BlockingCaller:
    """Makes the calls of a client, and waits in this thread."""

    _target: Callable[[Service], str]
    _calls: Callable[[Service], Any]

    def _ask(self, ask: Ask | Stream[Any]) -> Any:
        if isinstance(ask, Stream):
            return list(self._stream(ask))
        with named(self._target(ask.service)):
            return getattr(self._calls(ask.service), ask.method)(ask.request, timeout=ask.timeout_s)

    def _stream(self, stream: Stream[T]) -> Generator[T, None, None]:
        call = getattr(self._calls(stream.service), stream.method)(stream.request, timeout=stream.timeout_s)
        try:
            with named(self._target(stream.service)):
                for message in call:
                    if (record := stream.decode(message)) is not None:
                        yield record
        finally:
            call.cancel()


class AsyncCaller:
    """Makes the calls of a client without blocking the event loop."""

    _target: Callable[[Service], str]
    _calls: Callable[[Service], Any]
    _uploads: Any
    """The builder's `Calls` on a channel for threads."""

    async def _ask(self, ask: Ask | Stream[Any]) -> Any:
        if isinstance(ask, Stream):
            async with aclosing(self._stream(ask)) as records:
                return [record async for record in records]
        with named(self._target(ask.service)):
            if isinstance(ask.request, Iterator):
                return await _result(self._uploads.begin(ask.method, ask.request, ask.timeout_s))
            return await getattr(self._calls(ask.service), ask.method)(ask.request, timeout=ask.timeout_s)

    async def _stream(self, stream: Stream[T]) -> AsyncGenerator[T, None]:
        call = getattr(self._calls(stream.service), stream.method)(stream.request, timeout=stream.timeout_s)
        try:
            with named(self._target(stream.service)):
                async for message in call:
                    if (record := stream.decode(message)) is not None:
                        yield record
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The connection was closed under the stream; the task itself was not cancelled.
            raise CallFailed("CANCELLED: the client was closed", grpc.StatusCode.CANCELLED) from None
        finally:
            call.cancel()


def blocking(method: Callable[Concatenate[Any, P], Steps[T]]) -> Callable[Concatenate[Any, P], T]:
    """Return a method of the core for a client that waits in its thread."""

    @wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        steps, answer = method(self, *args, **kwargs), None
        while True:
            try:
                ask = steps.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # typed as a generator's, it is T
            answer = self._ask(ask)

    return _signed(call, method, "{}")


def awaited(
    method: Callable[Concatenate[Any, P], Steps[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Return a method of the core for a client on an event loop."""

    @wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        steps, answer = method(self, *args, **kwargs), None
        while True:
            try:
                ask = steps.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # typed as a generator's, it is T
            answer = await self._ask(ask)

    return _signed(call, method, "{}")


def iterated(
    method: Callable[Concatenate[Any, P], Stream[T]],
) -> Callable[Concatenate[Any, P], Generator[T, None, None]]:
    """Return a method of the core that streams, for a client that waits in its thread."""
    return _signed(_streamed(method), method, "Generator[{}, None, None]")


def async_iterated(
    method: Callable[Concatenate[Any, P], Stream[T]],
) -> Callable[Concatenate[Any, P], AsyncGenerator[T, None]]:
    """Return a method of the core that streams, for a client on an event loop."""
    return _signed(_streamed(method), method, "AsyncGenerator[{}, None]")


def _streamed(method: Callable[Concatenate[Any, P], Stream[Any]]) -> Callable[Concatenate[Any, P], Any]:
    @wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self._stream(method(self, *args, **kwargs))

    return call


_C = TypeVar("_C", bound=Callable[..., Any])


def _signed(call: _C, method: Callable[..., Any], form: str) -> _C:
    """Let `help` and documents say what comes back, and not how the core is written."""
    signature = inspect.signature(method)
    inner = re.fullmatch(r"(?:Steps|Stream)\[(.*)\]", str(signature.return_annotation))
    assert inner is not None, method  # noqa: S101 - of our own methods
    call.__signature__ = signature.replace(return_annotation=form.format(inner[1]))  # type: ignore[attr-defined]
    return call


async def _result(call: Any) -> Any:
    """Return the answer of a call that runs on gRPC's threads; it is cancelled with this task."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def on_end(_call: Any) -> None:
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(ended.set)

    call.add_done_callback(on_end)
    try:
        await ended.wait()
    finally:
        call.cancel()
    return call.result()
