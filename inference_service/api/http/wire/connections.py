"""Accepts connections up to a bound, and keeps the time of those that are open."""

import asyncio
import contextlib
import math
import socket
from collections.abc import Callable
from email.utils import formatdate
from ssl import SSLContext
from typing import Final

import structlog
from uvicorn.server import ServerState

from inference_service.api.http.wire.protocol import LINGER_S, BoundedHttp, ClientTimeouts
from loramux_shared.arrival import unread_bytes
from loramux_shared.rpc.stopping import supervise

MAX_ACCEPTS: Final = 64
"""Connections that are taken at a time; in between those that are open have their turn."""
ACCEPT_RETRY_S: Final = 1.0
"""Between attempts to accept, when the system has no descriptor left."""
MAX_UNREAD_BYTES: Final = 128 * 1024
"""Bytes of answers that the system keeps for a client, doubled by Linux; by itself it would be megabytes."""
MAX_REFUSED_CONNECTIONS: Final = 64
"""Refused connections that are read until their clients close; they count among `descriptors.RESERVED`."""
UNLIMITED_S: Final = 1e6
"""Seconds of asyncio's own limit of a handshake, which does not see that its bytes lie unread."""
WARNING_INTERVAL_S: Final = 60.0
"""A condition that lasts is logged this often."""
FULL_RESPONSE: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)

log = structlog.get_logger()


class Connections:
    """The connections of a server.

    Above the bound the one that is unused for the longest time makes room, in the middle of its handshake too;
    when all are being answered, the new one is refused. asyncio's own server is not used: it accepts without a
    bound, and writes a traceback per failed attempt, thousands a second.
    """

    def __init__(
        self,
        state: ServerState,
        make: Callable[[], BoundedHttp],
        patience: ClientTimeouts,
        bound: int,
        tls: SSLContext | None = None,
    ) -> None:
        self._state = state
        self._make = make
        self._patience = patience
        self._bound = bound
        self._tls = tls
        self._opening: dict[asyncio.Task[None], tuple[socket.socket, float, BoundedHttp]] = {}
        """Connections that are being opened, since when, and what they become just before a task ends."""
        self._refused: dict[socket.socket, float] = {}
        """Connections that were refused, and until when their clients may close them."""
        self._listener: socket.socket | None = None
        self._watching: asyncio.Task[None] | None = None
        self._warned_s = -math.inf

    def start(self, listener: socket.socket) -> None:
        """Accept from a listening socket from now on."""
        listener.setblocking(False)
        self._keep_time()
        self._listener = listener
        self._listen()
        self._watching = asyncio.create_task(supervise("connections", self._watch))

    def announce(self) -> None:
        """Let the answers that have not begun say that their connections end behind them."""
        for each in self.held():
            each.announce()

    def drain(self) -> None:
        """The same, and wait no longer for the rest of bodies."""
        for each in self.held():
            each.drain()

    async def close(self, timeout_s: float) -> None:
        """Stop listening, close idle connections, and cut the remaining ones after a time.

        Clients that have connected already are let in first: a listening socket that is closed resets them, and
        their requests were sent before they could know.
        """
        if (listener := self._listener) is None:
            return
        self._listener = None
        asyncio.get_running_loop().remove_reader(listener)
        with listener, contextlib.suppress(OSError):
            while self._accept(listener):
                pass
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._opening or self._state.connections:
                    await asyncio.sleep(0.01)
                    for each in self.held():
                        each.close_after_answers()
        for each in self.held():
            each.transport.abort()
        for sock in list(self._refused):
            self._close_refused(sock)
        ending = [*self._opening, *([self._watching] if self._watching else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def held(self) -> list[BoundedHttp]:
        """Return those that are open."""
        return [each for each in self._state.connections if isinstance(each, BoundedHttp)]

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept_some, self._listener)

    def _accept_some(self, listener: socket.socket) -> None:
        try:
            for _ in range(MAX_ACCEPTS):
                # Without TLS those that are being opened are open soon, and can make room then.
                if (self._tls is None and self._opening and self._is_full()) or not self._accept(listener):
                    return
        except OSError as error:
            self._warn("cannot accept connections", error=str(error))
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_RETRY_S, self._listen)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept one, False when none waits; raise OSError where the system has no descriptor left."""
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        sock.setblocking(False)
        if self.has_room():
            made = self._make()
            task = asyncio.create_task(self._open(sock, made))
            self._opening[task] = sock, asyncio.get_running_loop().time(), made
            task.add_done_callback(self._opened)
        else:
            self._refuse(sock)
        return True

    async def _open(self, sock: socket.socket, made: BoundedHttp) -> None:
        loop = asyncio.get_running_loop()
        limit_s = None if self._tls is None else UNLIMITED_S
        try:
            # asyncio sets it only where the listener was made with proto=IPPROTO_TCP; without it, every small
            # answer on a kept connection waits for the client's delayed acknowledgement, 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_UNREAD_BYTES)
            await loop.connect_accepted_socket(
                lambda: made, sock, ssl=self._tls, ssl_handshake_timeout=limit_s, ssl_shutdown_timeout=limit_s
            )
        except OSError:  # the client disconnected, or its handshake failed
            sock.close()

    def _opened(self, task: asyncio.Task[None]) -> None:
        sock, *_ = self._opening.pop(task)
        if task.cancelled():  # perhaps before it began
            sock.close()

    def has_room(self) -> bool:
        """True when one more can be held, for which the one that is unused for the longest time may go."""
        if not self._is_full():
            return True
        unused: list[tuple[float, BoundedHttp | asyncio.Task[None]]] = [
            (since, each) for each in self.held() if (since := each.unused_since) is not None
        ]
        unused += self._unopened()
        self._warn("connections are at their bound", bound=self._bound, unused=len(unused))
        for _, each in sorted(unused, key=lambda pair: pair[0]):
            if isinstance(each, asyncio.Task):
                if not unread_bytes(self._opening[each][0]):
                    each.cancel()
                    return True
            elif not each.has_unread():
                each.transport.abort()
                self._state.connections.discard(each)
                return True
        return False

    def _is_full(self) -> bool:
        held = len(self._state.connections)
        if held + len(self._opening) < self._bound:  # far from it: the cost of a connection is none of all
            return False
        return held + len(self._unopened()) >= self._bound

    def _unopened(self) -> list[tuple[float, asyncio.Task[None]]]:
        """Return the connections that are neither open nor given up, and since when they are being opened."""
        return [
            (since, task)
            for task, (_, since, made) in self._opening.items()
            if not (task.cancelling() or made in self._state.connections)
        ]

    def _refuse(self, sock: socket.socket) -> None:
        """Say that there is no room, and read on until the client closes: closed before, it would be reset."""
        try:
            if self._tls is None:
                with contextlib.suppress(BlockingIOError):
                    sock.recv(MAX_UNREAD_BYTES)
                sock.send(FULL_RESPONSE)
            if self._tls is not None or len(self._refused) >= MAX_REFUSED_CONNECTIONS:
                sock.close()
                return
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # the client disconnected
            sock.close()
            return
        loop = asyncio.get_running_loop()
        self._refused[sock] = loop.time() + LINGER_S
        loop.add_reader(sock, self._drop, sock)

    def _drop(self, sock: socket.socket) -> None:
        """Read what a refused client sends, until it closes."""
        try:
            if sock.recv(MAX_UNREAD_BYTES):
                return
        except BlockingIOError:
            return
        except OSError:  # the client reset the connection
            pass
        self._close_refused(sock)

    def _close_refused(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)
        del self._refused[sock]
        sock.close()

    async def _watch(self) -> None:
        patience = self._patience
        shortest_s = min(patience.head_s, patience.body_s, patience.idle_s, patience.read_s)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, shortest_s / 4))
            self._keep_time()
            now = loop.time()
            for each in self.held():
                each.check(now)
            for task, (sock, since, _) in self._opening.items():
                if now >= since + patience.head_s and not unread_bytes(sock):
                    task.cancel()
            for sock in [sock for sock, end in self._refused.items() if now >= end]:
                self._close_refused(sock)

    def _keep_time(self) -> None:
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]

    def _warn(self, event: str, **fields: object) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._warned_s >= WARNING_INTERVAL_S:
            self._warned_s = now
            log.warning(event, **fields)
