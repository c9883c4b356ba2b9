"""HTTP on a connection: what is refused before an application sees it, and how long a client may take.

httptools reads heads, chunk extensions and trailers without end, and some requests whose length two servers
could read differently. What is refused here is answered, and the connection closed.
Source of the rules: RFC 9112, sections 2.2, 3.2, 6.1, 6.3, 7.1 and 11.2.
"""

import asyncio
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

import httptools
from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from inference_service.api.http.wire.errors import status_of
from inference_service.api.http.wire.front import ARRIVED, DRAINING
from inference_service.api.http.wire.refusals import fault_body, refused_body
from inference_service.api.http.wire.reply import CONNECTION
from inference_service.core.request import MIN_GENERATION, STICKY_KEY
from loramux_shared.arrival import arrived_at, unread_bytes, unsent_bytes
from loramux_shared.faults import ShuttingDown

LARGE_BYTES, MAX_WAITING_PARTS = 16 * 1024, 16
"""Bytes of a part that is written at once, and parts that wait for the end of a turn of the loop."""


class StagedTransport:
    """A transport that closes in stages.

    A socket that is closed while bytes come, or lie unread, is reset, and its client may lose the last answer.
    So `close` says that nothing more comes, and reads on; the client closes then, or `abort` does when it takes
    too long. Over TLS asyncio does so itself.
    Source: RFC 9112, section 9.6.
    """

    def __init__(self, transport: Any, closed: Callable[[], None]) -> None:
        """Stand before a transport; closed is called when the first stage was."""
        self._transport = transport
        self._closed = closed
        self._eof_written = False
        self._unwritten: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        """Everything else is the transport's."""
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """True when nothing more can be said; what comes is to be dropped."""
        return self._eof_written or bool(self._transport.is_closing())

    def write(self, data: bytes) -> None:
        """Write with all else of this turn of the loop: each call of the system wakes the client too."""
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self.flush)
        self._unwritten.append(data)
        if len(data) > LARGE_BYTES or len(self._unwritten) > MAX_WAITING_PARTS:
            self.flush()  # so that the transport tells when the client does not read

    def flush(self, *last: bytes) -> None:
        """Write what waits, and more, now."""
        parts, self._unwritten = (*self._unwritten, *last), []
        if parts and not self._eof_written:
            self._transport.write(b"".join(parts))

    def close(self) -> None:
        """Say nothing more."""
        if self.is_closing():
            return
        self.flush()
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        self._eof_written = True
        try:
            self._transport.write_eof()
        except OSError:  # the client was faster
            self._transport.abort()
            return
        self._transport.resume_reading()
        self._closed()


HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(:[0-9]*)?")

MAX_TARGET_BYTES: Final = 2**16 - 1
"""Most that httptools takes apart."""
TARGET: Final = re.compile(rb"(/|https?://[^/]|\*$)[^#]*$", re.IGNORECASE)


SINGLE_HEADERS: Final = (b"content-type", b"content-encoding", MIN_GENERATION.encode(), STICKY_KEY.encode())
"""Headers of which two readers could take different ones, if there were several."""


class Refused(ValueError):
    """A head that is not understood: a status, a code and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.problem = (status, code, message)


def check_head(version: str, url: bytes, headers: Iterable[tuple[bytes, bytes]], *, upgrades: bool) -> None:
    """Look at a request's version, target and header fields, with names in small letters.

    upgrades is true where it asks for another protocol. Raise Refused for what two servers could read
    differently, or what is not spoken here.
    """
    _check_request_line(version, url)
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        fields.setdefault(name, []).append(value.strip(b" \t"))
    _check_fields(version, fields)
    _check_framing(version, fields, upgrades=upgrades)
    if any(each.lower() != b"100-continue" for each in fields.get(b"expect", [])):
        raise Refused(417, "invalid_http", "expected the header Expect to be `100-continue`.")


def _check_request_line(version: str, url: bytes) -> None:
    """Raise Refused for another version than 1.0 and 1.1, and for a target that is too long or no path."""
    if version not in ("1.0", "1.1"):
        raise Refused(505, "invalid_http", "expected HTTP/1.1.")
    if len(url) > MAX_TARGET_BYTES:
        raise Refused(431, "head_too_large", f"the target of the request exceeds {MAX_TARGET_BYTES} bytes.")
    if not TARGET.match(url):
        raise Refused(
            400, "invalid_http", "expected the target of the request as a path, or as http://HOST/PATH."
        )


def _check_fields(version: str, fields: Mapping[bytes, Sequence[bytes]]) -> None:
    """Raise Refused for hosts, headers of `SINGLE_HEADERS` and a content-encoding that are not spoken here."""
    hosts = fields.get(b"host", [])
    if len(hosts) > 1 or (version == "1.1" and not hosts) or not all(map(HOST.fullmatch, hosts)):
        raise Refused(400, "invalid_http", "expected one valid Host header.")
    if twice := [name.decode() for name in SINGLE_HEADERS if len(fields.get(name, [])) > 1]:
        raise Refused(400, "invalid_http", f"expected the header {twice[0]} once.")
    encoding = fields.get(b"content-encoding", [b""])[0].decode("latin-1")
    if encoding.lower() not in ("", "identity"):
        raise Refused(
            415,
            "unsupported_media_type",
            f"expected a body without content-encoding, found {encoding[:20]!r}: send it uncompressed.",
        )


def _check_framing(version: str, fields: Mapping[bytes, Sequence[bytes]], *, upgrades: bool) -> None:
    """Raise Refused for a body whose length two servers could read differently (RFC 9112, section 6.3)."""
    codings = fields.get(b"transfer-encoding", [])
    if codings and (version == "1.0" or b"content-length" in fields):
        raise Refused(400, "invalid_http", "Transfer-Encoding is not allowed here.")
    if codings and [each.lower() for each in codings] != [b"chunked"]:
        raise Refused(501, "invalid_http", "expected the transfer coding `chunked`, once.")
    if upgrades and (codings or fields.get(b"content-length", [b"0"]) != [b"0"]):
        # httptools takes what follows for another protocol, and would read the body as a request.
        raise Refused(
            501, "invalid_http", "an Upgrade with a body is not supported: send HTTP/1.1 from the start."
        )


def end_with_connection(app: ASGIApp, cycle: Any) -> ASGIApp:
    """Return an application whose answer has no chunks: the end of the connection ends the body.

    uvicorn compares what is not sent in chunks with a length, so each part is expected to be as long as it is.
    """

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_part(message: Message) -> None:
            if message["type"] == "http.response.start":
                cycle.chunked_encoding = False
            elif message["type"] == "http.response.body":
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_part)

    return run


MAX_HEAD_BYTES: Final = 64 * 1024
"""Most bytes of a request's line and headers, of its trailers, or of a chunk's head; a read may bring more."""
MAX_FIELDS: Final = 200
"""Headers of a request; also its trailers."""
MAX_FRAMING_BYTES_PER_BYTE: Final = 8
"""Bytes of framing that a byte of the body may take, besides MAX_HEAD_BYTES: chunks of one byte take 6."""
MAX_PIPELINED: Final = 16
"""Requests that wait on one connection for the answer before them."""
LINGER_S: Final = 1.0
"""For the client to close, once everything was said to it."""
FIRST_REQUEST_S: Final = 0.1
"""For a client that has just connected to say what it wants, once the server parts with everybody."""
DRAIN_BODY_S: Final = 1.0
"""For the rest of a body once the server drains."""
PROGRESS_BYTES: Final = 16 * 1024
"""Bytes that a client must take of an answer that waits, in `ClientTimeouts.read_s`."""


@dataclass(frozen=True)
class ClientTimeouts:
    """The seconds that a client may take; none end while its bytes lie unread."""

    head_s: float = 10.0
    """Seconds from the connection, or from the first byte of a later request, to the end of the head."""
    body_s: float = 60.0
    """Seconds from there to the end of the body."""
    pause_s: float = 30.0
    """Seconds from one piece of the body to the next."""
    idle_s: float = 65.0
    """Between an answer and the next request: longer than load balancers wait, so that they close first."""
    read_s: float = 30.0
    """To take PROGRESS_BYTES of an answer that waits for it."""


USUAL: Final = ClientTimeouts()


class BoundedHttp(HttpToolsProtocol):
    """Bounds what a client sends, and how long it takes."""

    url: bytes = b""
    """URL of the request that is being read."""

    def __init__(
        self,
        *args: Any,
        patience: ClientTimeouts,
        refused: Callable[[int], None],
        leaving: Callable[[], bool],
        **kwargs: Any,
    ) -> None:
        """Wait as long as patience says; refused hears the status of every refusal.

        While leaving is true, every answer says that the connection ends behind it.
        """
        super().__init__(*args, **kwargs)
        self._patience = patience
        self._leaving = leaving
        self._on_refusal = refused
        self._deadline = math.inf
        self._body_end = math.inf
        """When the body that is awaited must be whole."""
        self._in_head = False
        self._whole = True
        """No part of a request is awaited."""
        self._overhead = self._since_body = self._body = self._trailers = self._bodies = 0
        self._problem = (400, "invalid_http", "the request is not valid HTTP/1.1.")
        self._draining = False
        self._unused_since = 0.0
        self._answered: Any = None
        """The cycle whose answer is under way; `cycle` is that of the newest request."""
        self._reads = 0
        """Times that something came."""
        self._overdue = -1
        """Unread bytes when the deadline was first seen to be over; -1: it was not."""
        self._waits = (0.0, 0)
        """Since when the answer waits for the client, and how many bytes of it waited then."""

    def has_room(self) -> bool:
        """Return True where the stream that is being answered can be written to, and its client takes it."""
        cycle = self._answered
        return bool(
            cycle.response_started
            and cycle.chunked_encoding
            and not (cycle.response_complete or cycle.disconnected or self.flow.write_paused)
        )

    def write_part(self, data: bytes) -> None:
        """Write a part of that stream, as its `send` does."""
        self._staged.flush(b"%x\r\n%b\r\n" % (len(data), data))

    @property
    def unused_since(self) -> float | None:
        """Since when the server owes the client nothing, by the loop's clock; None while it answers."""
        return None if self._busy() else self._unused_since

    def announce(self) -> None:
        """Let the newest answer say that the connection ends behind it, unless it has begun."""
        if self._busy() and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def drain(self) -> None:
        """Wait no longer for the rest of a body."""
        self._draining = True
        self.announce()
        if not self._whole and not self._in_head:
            self._deadline = min(self._deadline, self.loop.time() + DRAIN_BODY_S)

    def close_after_answers(self) -> None:
        """Close: behind the answers that are under way, else now.

        A client that asks in this moment reads what is said here as its answer. 408 is what RFC 9110 has for
        that: the request may be sent again, on another connection. One that asks nothing takes it for the end.
        """
        if self.transport.is_closing() or self._has_just_come():
            return
        if self._busy():
            self.cycle.keep_alive = False
        elif not self._whole and not self._in_head:  # the answer is complete, and still being sent
            self.transport.close()
        else:
            fault = ShuttingDown(DRAINING)
            self._answer_and_close(
                408 if self._whole else status_of(fault),
                fault_body({"path": self._path}, fault),
                came=self._in_head,
            )

    def check(self, now: float) -> None:
        """End the connection when the client took too long; called about once a second."""
        if self._is_stalled(now):
            self.transport.abort()
        elif self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._wait(LINGER_S)  # the client still reads the answer
        elif now >= self._deadline and not self._owes_a_read():
            self._expire()

    # Events of the connection.

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        self._sock = transport.get_extra_info("socket")
        self._staged = StagedTransport(transport, self._linger)
        super().connection_made(cast(asyncio.Transport, self._staged))
        self._unused_since = self.loop.time()
        self._waits = (self.loop.time(), 0)
        self._wait(self._patience.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the request that is being answered, not only the newest."""
        self.pipeline.clear()
        if self._busy():
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        self._reads += 1
        if self.transport.is_closing():
            return
        before = self._bodies
        self._feed(data)
        if self.transport.is_closing():
            return
        framing = len(data) - (self._bodies - before)
        self._overhead += framing
        self._since_body = 0 if self._bodies > before else self._since_body + framing
        if self._whole:
            return
        if self._in_head and self._since_body > MAX_HEAD_BYTES:
            self._refuse(431, "head_too_large", f"the head of the request exceeds {MAX_HEAD_BYTES} bytes.")
            return
        most = MAX_HEAD_BYTES + MAX_FRAMING_BYTES_PER_BYTE * self._body
        if self._since_body > MAX_HEAD_BYTES or self._overhead > most:
            self._refuse(400, "invalid_http", "the chunk extensions or trailers of the request are too large.")

    def pause_writing(self) -> None:
        """Begin to wait for the client."""
        super().pause_writing()
        self._waits = (self.loop.time(), self._unsent())

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:  # upgrades are ignored: HTTP/1.1 continues
                data = data[upgrade.args[0] :]
            except httptools.HttpParserError:
                self._refuse(*self._problem)
                return
            else:
                return

    # Events of the parser.

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._in_head, self._whole = True, False
        self._overhead = self._since_body = self._body = self._trailers = 0
        self._wait(math.inf if self._busy() else self._patience.head_s)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers are counted, and dropped, for nothing here reads them."""
        if self._in_head:
            super().on_header(name, value)
        else:
            self._trailers += 1
        if max(len(self.headers), self._trailers) > MAX_FIELDS:
            self._reject(431, "head_too_large", f"the request has more than {MAX_FIELDS} header fields.")

    def on_headers_complete(self) -> None:
        """Refuse what two servers could read differently; else let the request in."""
        self._check_head()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._reject(400, "invalid_http", f"more than {MAX_PIPELINED} requests wait for an answer.")
        queued = self._busy()
        self.scope["state"][CONNECTION] = self
        self.scope["state"][ARRIVED] = arrived_at(self.transport.get_extra_info("socket"))
        super().on_headers_complete()
        self._in_head, self._since_body = False, 0
        if self._leaving():
            self.announce()
        self._wait_for_body(math.inf if queued else self._patience.body_s)

    def on_body(self, body: bytes) -> None:
        """Count what is no framing."""
        self._body += len(body)
        self._bodies += len(body)
        if self._body_end < math.inf and not self._draining:
            self._wait_for_body(self._body_end - self.loop.time())
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the answer, or for the next request where this one was answered before its end."""
        self._whole = True
        self._body_end = math.inf
        super().on_message_complete()
        if self._busy():
            self._wait(math.inf)
        else:
            self._unused_since = self.loop.time()
            self._wait(self._patience.idle_s)

    # Events of the answers.

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        if cycle.scope["http_version"] == "1.0":  # such a client knows no chunks: RFC 9112, section 6.1
            app = end_with_connection(app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Begin the next request, or wait for one."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the deadline stays: bytes between requests do not renew it
        if self._busy():
            whole = self._whole or self._in_head or self.pipeline
            self._wait_for_body(math.inf if whole else self._patience.body_s)
            return
        self._unused_since = self.loop.time()
        if self._whole or self._in_head:
            self._wait(self._patience.idle_s if self._whole else self._patience.head_s)

    def _wait_for_body(self, seconds: float) -> None:
        self._body_end = self.loop.time() + seconds
        self._wait(min(seconds, self._patience.pause_s) if seconds < math.inf else seconds)

    def _busy(self) -> bool:
        return self._answered is not None and not self._answered.response_complete

    def _has_begun(self) -> bool:
        """True when an answer is under way, or has been given to a request that is still being sent."""
        if self._busy():
            return self._in_head or bool(self.pipeline) or bool(self._answered.response_started)
        return not self._in_head and not self._whole

    def _has_just_come(self) -> bool:
        if self._answered is not None or not self._whole:
            return False
        return self.loop.time() - self._unused_since < FIRST_REQUEST_S or self.has_unread()

    def has_unread(self) -> bool:
        """True when the client sent something that this process has not read yet."""
        return unread_bytes(self._sock) > 0

    def _owes_a_read(self) -> bool:
        """True where the deadline is over while bytes lie unread: the process is late, and not the client.

        Of a client that sends without end something is always unread, so one read is enough.
        """
        if self.transport.is_closing() or not self.has_unread():
            return False
        if self._overdue < 0:
            self._overdue = self._reads
        return self._overdue == self._reads

    def _unsent(self) -> int:
        """Return the bytes of answers that the client has not taken, from here or from the system."""
        return int(self.transport.get_write_buffer_size()) + unsent_bytes(self._sock)

    def _wait(self, seconds: float) -> None:
        self._overdue = -1
        self._deadline = self.loop.time() + (LINGER_S if self.transport.is_closing() else seconds)

    def _linger(self) -> None:
        """Wait for the client to close; from here on nothing that it sends is looked at."""
        self._wait(LINGER_S)
        self._waits = (self.loop.time(), self._unsent())

    def _is_stalled(self, now: float) -> bool:
        """True when an answer, or its rest before the connection closes, waits for the client too long."""
        here = self.transport.get_write_buffer_size()
        left = self._unsent() if here else 0
        since, waited = self._waits
        waiting = self.flow.write_paused or (here and self.transport.is_closing())
        if not waiting or waited - left >= PROGRESS_BYTES:
            self._waits = (now, left)
            return False
        return now - since > self._patience.read_s

    def _expire(self) -> None:
        if self.transport.is_closing() or self._whole:
            self.transport.abort()
        elif self._in_head and not self._overhead:
            self.transport.close()  # the connection has no request
        elif self._draining:
            fault = ShuttingDown(DRAINING)
            self._answer_and_close(status_of(fault), fault_body({"path": self._path}, fault))
        else:
            self._refuse(408, "request_timeout", "the request did not arrive in time.")

    def _check_head(self) -> None:
        version, upgrades = self.parser.get_http_version(), self.parser.should_upgrade()
        try:
            check_head(version, self.url, self.headers, upgrades=upgrades)
        except Refused as refused:
            self._reject(*refused.problem)

    def _reject(self, status: int, code: str, message: str) -> NoReturn:
        """Stop the parser, which leads to `_refuse`."""
        self._problem = (status, code, message)
        raise ValueError(message)

    @property
    def _path(self) -> str:
        return self.url.partition(b"?")[0].decode("latin-1")

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer_and_close(status, refused_body(self._path, message, status, code))

    def _answer_and_close(self, status: int, body: Mapping[str, object], *, came: bool = True) -> None:
        """Answer in the place of the application, and end the connection; `came`: a request came."""
        if self._has_begun() or self.transport.is_closing():
            self.transport.abort()  # no second answer, and none within an answer or after the end
            return
        if self._busy():
            self._answered.disconnected = True
            self._answered.message_event.set()
        content = to_json(body)
        retry = b"" if came and status != 503 else b"retry-after: 1\r\n"
        fields = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(content)
        self.transport.write(STATUS_LINE[status] + fields + retry + b"\r\n" + content)
        self.transport.close()
        self._linger()
        if came:
            self._on_refusal(status)
