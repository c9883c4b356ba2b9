"""The channel between the engine's process and an API process: messages in msgpack over a Unix socket."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, cast

import msgpack
import structlog

from loramux_shared.faults import Fault, InternalFault, ReplicaFailed, fault_from, fault_to

MOST_UNREAD: Final = 64 << 20
"""Bytes that wait for a peer that does not read; a channel with more is closed."""
MOST_BYTES: Final = 1 << 30
"""Bytes of a message."""
GONE: Final = "the process behind the API ended. Retry with another replica."

log = structlog.get_logger()


class Kind(IntEnum):
    """The first element of a message."""

    SAY = 0
    """Name and arguments; nobody answers."""
    ASK = 1
    """Number, name and arguments."""
    CANCEL = 2
    """Number of what was asked."""
    ANSWER = 3
    """Number and value."""
    FAIL = 4
    """Number and fault."""


class Channel(asyncio.Protocol):
    """One end of a channel: says and asks by name, and calls the functions that have the peer's names."""

    def __init__(
        self,
        handlers: dict[str, Callable[..., None]],
        answers: Mapping[str, Callable[..., Awaitable[Any]]],
        lost: Callable[[], None],
        room: Callable[[], None] = lambda: None,
    ) -> None:
        """Call handlers for what the peer says, answers for what it asks, and lost once it is gone.

        room is called when the peer reads on, after `writable` was false.
        """
        self._room = room
        self.writable = True
        """False while the peer has much to read: what can wait is better not sent."""
        self.handlers = handlers
        self._answers, self._lost = answers, lost
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._working: dict[int, asyncio.Task[None]] = {}
        self._packer = msgpack.Packer(unicode_errors="surrogatepass")
        self._unpacker = msgpack.Unpacker(
            strict_map_key=False, unicode_errors="surrogatepass", max_buffer_size=MOST_BYTES
        )
        self._transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        """True while the peer is there."""
        return self._transport is not None

    def say(self, name: str, *arguments: Any) -> None:
        """Send a message; nothing happens when the peer is gone."""
        self._send([Kind.SAY, name, *arguments])

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Send a message and return the answer; one that is cancelled is cancelled at the peer too.

        Raises:
            ReplicaFailed: the peer is gone.
            Fault: that of the peer.
        """
        if self._transport is None:
            raise ReplicaFailed(GONE)
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send([Kind.ASK, number, name, *arguments])
        try:
            return await answer
        except asyncio.CancelledError:
            self._send([Kind.CANCEL, number])
            raise
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """Close at once, whatever was not sent yet."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        """Note that the peer has much to read."""
        self.writable = False

    def resume_writing(self) -> None:
        """Tell that the peer reads on."""
        self.writable = True
        self._room()

    def data_received(self, data: bytes) -> None:
        """Take messages."""
        self._unpacker.feed(data)
        for kind, *rest in self._unpacker:
            self._take(kind, *rest)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """End what waits for the peer, and what the peer asked for."""
        self._transport = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ReplicaFailed(GONE))
        for task in self._working.values():
            task.cancel()
        self._lost()

    def _take(self, kind: int, subject: Any, *rest: Any) -> None:
        match kind:
            case Kind.SAY:
                self.handlers[subject](*rest)
            case Kind.ASK:
                task = asyncio.create_task(self._answer(subject, *rest))
                self._working[subject] = task
                task.add_done_callback(lambda _: self._working.pop(subject))
            case Kind.CANCEL:
                if subject in self._working:
                    self._working[subject].cancel()
            case _:
                answer = self._waiting.get(subject)
                if answer is not None and not answer.done():
                    if kind == Kind.ANSWER:
                        answer.set_result(rest[0])
                    else:
                        answer.set_exception(fault_from(rest[0]))

    async def _answer(self, number: int, name: str, *arguments: Any) -> None:
        try:
            message = [Kind.ANSWER, number, await self._answers[name](*arguments)]
        except Fault as fault:
            message = [Kind.FAIL, number, fault_to(fault)]
        except Exception:  # the last line, as that of a server
            log.exception("API process: unexpected error", question=name)
            internal = InternalFault(
                "loramux failed inside; the server's log has the details. Please report it."
            )
            message = [Kind.FAIL, number, fault_to(internal)]
        self._send(message)

    def _send(self, message: Sequence[Any]) -> None:
        if self._transport is None:
            return
        if self._transport.get_write_buffer_size() > MOST_UNREAD:
            log.error("process does not read its messages: its channel is closed", unread=MOST_UNREAD)
            self._transport.abort()
            return
        self._transport.write(self._packer.pack(message))
