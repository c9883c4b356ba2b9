"""Answers on their way out, while the client is there: one JSON object, or server-sent events."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NoReturn, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from inference_service.api.http.wire.errors import error_body
from inference_service.core.request import AnswerStarted
from inference_service.driver.delivery import Sink
from loramux_shared.faults import Fault
from loramux_shared.routes import MODEL_HEADER

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
E = TypeVar("E", bound=Mapping[str, object])
E_co = TypeVar("E_co", bound=Mapping[str, object], covariant=True)
CONNECTION: Final = "connection"
"""Key of a scope's state: the connection, which writes parts of a stream."""
MARK: Final = "\0"
"""Stands for the text in a `TextEvent`."""
DONE = b"data: [DONE]\n\n"
"""Ends a stream that did not fail."""
HEARTBEAT_S: Final = 15.0
"""Seconds of silence before the first event of a stream after which proxies are sent a comment."""
HEARTBEAT: Final = b": waiting\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on without buffering
)


class Reply(Response, Generic[T_co]):
    """An answer that is one JSON object, whose type the OpenAPI document describes."""

    def __init__(self, body: T_co, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(body), status, headers, "application/json")


def event(body: Mapping[str, object]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


def encoded(bodies: Iterable[Mapping[str, object]]) -> bytes:
    """Return server-sent events."""
    return b"".join(map(event, bodies))


class TextEvent:
    """A server-sent event that differs from others of its stream in one text alone."""

    def __init__(self, body_of: Callable[[str], Mapping[str, object]]) -> None:
        self._before, self._after = event(body_of(MARK)).split(to_json(MARK))

    def of(self, text: str) -> bytes:
        """Return the event of a text: the same bytes as `event` of its body."""
        return self._before + to_json(text) + self._after


def sink_of(http: Request, encode: Callable[[T], bytes]) -> Sink[T] | None:
    """Return a short cut to the client of a stream; None where the server has none."""
    connection = http.scope["state"].get(CONNECTION)
    if connection is None:
        return None

    def take(item: T) -> None:
        if data := encode(item):
            connection.write_part(data)

    return Sink(connection.has_room, take)


def named_event(body: Mapping[str, object]) -> bytes:
    """Return a server-sent event with a name: the body's ``type``."""
    return b"event: " + str(body["type"]).encode() + b"\n" + event(body)


@dataclass
class Head:
    """The identity of one answer: its id, its time, and what answers."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that name the version, for proxies and logs."""

    def begin(self, started: AnswerStarted) -> None:
        """Note what answers: the model, the deployment's generation, and the adapter's digest or the base."""
        self.model, digest = started.model.name, started.model.digest
        of_adapter = {"x-loramux-digest": digest} if digest else {}
        number = str(started.generation)
        self.headers = {MODEL_HEADER: self.model} | of_adapter | {"x-loramux-generation": number}
        self.fingerprint = f"fp_{started.generation}_{started.model.digest[:12] or 'base'}"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what work returns; it is cancelled as soon as the client goes away.

    The body of the request must have been read. Raise ClientDisconnect where the client goes away.
    """
    async with _until(asyncio.ensure_future(_until_gone(receive))):
        return await work


@asynccontextmanager
async def _until(gone: asyncio.Future[NoReturn]) -> AsyncGenerator[None]:
    """End the block with ClientDisconnect once the client goes away, which nobody waits for behind it."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in one
    before, left = task.cancelling(), False

    def leave(_: object) -> None:
        nonlocal left
        left = task.cancel()

    gone.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if left and task.uncancel() <= before:
            gone.result()
        raise
    finally:
        gone.remove_done_callback(leave)
        _let_go(gone)


def _let_go(gone: asyncio.Future[NoReturn]) -> None:
    if not gone.cancel() and not gone.cancelled():
        gone.exception()  # asyncio logs one that nobody retrieves


async def _until_gone(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


@dataclass(frozen=True)
class Framing:
    """The framing of a stream."""

    event: Callable[[Mapping[str, object]], bytes]
    failure: Callable[[Fault], Mapping[str, object]]
    """The body of the event that tells a fault, which is the last one."""
    end: bytes
    """Comes behind the events of a stream that did not fail."""


UNNAMED: Final = Framing(event, error_body, DONE)
"""The framing of chats and completions."""


def named(failure: Callable[[Fault], Mapping[str, object]]) -> Framing:
    """Return the framing of events that are named by the type in their bodies; the last of them is the end."""
    return Framing(named_event, failure, b"")


class EventStream(Response, Generic[E_co]):
    """An answer in server-sent events; a fault on the way is the last one.

    A client that does not read blocks only this stream; one that never does is cut off by `protocol`.
    """

    def __init__(
        self,
        first: asyncio.Future[E_co],
        gone: asyncio.Future[NoReturn],
        rest: AsyncGenerator[E_co],
        headers: Mapping[str, str],
        framing: Framing = UNNAMED,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        super().__init__()
        self._framing = framing
        self._head = [*HEADERS, *((name.encode(), value.encode()) for name, value in headers.items())]
        self._first, self._gone = first, gone
        self._rest = rest
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        """Send everything; what produces it is closed in every case."""
        async with _until(self._gone), aclosing(self._rest):
            await self._send(send)

    async def _send(self, send: Send) -> None:
        framing, first = self._framing, self._first
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._head})
            while not first.done():
                if not (await asyncio.wait((first,), timeout=self._heartbeat_s))[0]:
                    await send(_part(HEARTBEAT))
            await send(_part(framing.event(first.result())))
            async for body in self._rest:
                await send(_part(framing.event(body)))
        except Fault as fault:
            end = framing.event(framing.failure(fault))
        else:
            end = framing.end
        finally:
            await _ended(first)
        await send({"type": "http.response.body", "body": end, "more_body": False})


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _ended(task: asyncio.Future[Any]) -> None:
    """Cancel a task that runs, and return when it has ended; its exception is the caller's to raise."""
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    elif not task.cancelled():
        task.exception()  # asyncio logs one that nobody retrieves


async def open_stream(
    receive: Receive,
    bodies: AsyncGenerator[E],
    head: Head,
    framing: Framing = UNNAMED,
    heartbeat_s: float = HEARTBEAT_S,
) -> EventStream[E]:
    """Wait for the first event, so that a request that is refused gets a status of its own.

    A stream that has none after heartbeat_s seconds begins with comments; a fault is its last event then.

    Raises:
        Fault: the request is refused.
        ClientDisconnect: the client went away.
    """
    first, gone = asyncio.ensure_future(anext(bodies)), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((first, gone), timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        elif gone.done():
            gone.result()
    except BaseException:
        _let_go(gone)
        await _ended(first)
        await bodies.aclose()
        raise
    return EventStream(first, gone, bodies, head.headers, framing, heartbeat_s)
