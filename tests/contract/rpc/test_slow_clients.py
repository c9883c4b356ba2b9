"""Clients that send or read slowly, or not at all, at both endpoints, under a clock that the tests move."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from inference_service.api.http.wire import protocol
from inference_service.api.http.wire.protocol import MAX_HEAD_BYTES
from inference_service.api.rpc.servicer import SERVICE_NAME
from loramux import AsyncClient
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.access.guard import Guard
from loramux_shared.rpc import calls, options
from loramux_shared.rpc.status import fault_of
from tests.contract.rpc.raw_http2 import (
    DATA,
    HEADERS,
    WINDOW_UPDATE,
    call,
    connect,
    frame,
    message,
    until_ended,
)
from tests.support.access import keyring
from tests.support.raw_http import JSON
from tests.support.services.endless import BOUND, HEALTH, MODEL, EndlessApis
from tests.support.waiting import BOUND_S, Clock, bounded, result_of, until

HOUR, NEVER = 3600.0, 1e9
BODY = json.dumps({"model": MODEL, "prompt": "HI", "stream": True}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\n" + JSON
ASK = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
QUIET = BODY.replace(b"HI", b"WAIT")
WAIT = POST + b"Content-Length: %d\r\n\r\n" % len(QUIET) + QUIET
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HTTP_TIMES, RPC_TIMES = protocol.ClientTimeouts.__dataclass_fields__, ("send_s", "pause_s", "read_s")


@pytest.fixture
async def clock() -> Clock:
    """The time of both endpoints."""
    return Clock()


@pytest.fixture
async def apis(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EndlessApis]:
    """The endpoints of a service; the timeout that a test names is an hour, the others never pass."""
    limit, keys = getattr(request, "param", ("", False))
    guard = Guard(keyring("infer")[1]) if keys else Guard()
    times = {name: HOUR if name == limit else NEVER for name in (*HTTP_TIMES, *RPC_TIMES)}
    monkeypatch.setattr(options, "PING_TIMEOUT_S", 2 * BOUND_S)  # raw clients answer no pings
    http = protocol.ClientTimeouts(**{name: times[name] for name in HTTP_TIMES})
    rpc = calls.Patience(**{name: times[name] for name in RPC_TIMES})
    async with EndlessApis(tmp_path, guard, http, rpc) as made:
        yield made


def patience(limit: str = "", *, keys: bool = False) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("apis", [(limit, keys)], indirect=True, ids=[""])


SLOW: dict[str, tuple[tuple[str, bool], bytes, int | None, bytes, int | None]] = {
    "nothing": (("head_s", False), b"", None, b"", None),
    "empty lines": (("head_s", False), b"", None, b"\r\n", None),
    "a head": (("head_s", False), b"GET /health HTTP/1.1\r\nX-A: ", None, b"a", 408),
    "a later head": (("head_s", False), HEALTH + b"GET / HTTP/1.1\r\nX-A: ", 200, b"a", 408),
    "empty lines behind an answer": (("idle_s", False), HEALTH, 200, b"\r\n", None),
    "a body": (("body_s", False), CHUNKED, None, b"1\r\n \r\n", 408),
    "a body that pauses": (("pause_s", False), CHUNKED + b"1\r\n \r\n", None, b"", 408),
    "a body behind a refusal": (("body_s", True), CHUNKED, 401, b"1\r\n \r\n", None),
}
"""The limit; what is sent first, and the status of its answer; what trickles, and the status of that."""


@pytest.mark.parametrize(
    ("apis", "first", "answered", "piece", "status"), SLOW.values(), indirect=["apis"], ids=SLOW
)
async def test_a_request_that_trickles_ends_at_its_limit(
    apis: EndlessApis, clock: Clock, first: bytes, answered: int | None, piece: bytes, status: int | None
) -> None:
    """A slow request is 408, a connection without one just ends, and no byte that comes renews the limit."""
    client = await apis.raw(first)
    if answered:
        assert (await client.answer())[0] == answered
    answer = asyncio.create_task(client.reader.read())
    for _ in range(3):
        await client.send(piece)
        await apis.seen()
        assert not answer.done()
        clock.advance(0.4 * HOUR)
    raw = await result_of(answer, "the end of a slow connection")
    assert raw.startswith(b"HTTP/1.1 408") if status else raw == b""
    assert not status or b'"request_timeout"' in raw
    client.close()


@patience(keys=True)
@pytest.mark.parametrize(
    ("before", "piece", "status"),
    [
        (b"GET /", b"a" * 4096, b"431"),
        (b"GET / HTTP/1.1\r\n", b"X-A: %s\r\n" % (b"a" * 4000), b"431"),
        (CHUNKED, b"1;" + b"a" * 4096, b"401"),
        (CHUNKED + b"0\r\n", b"X-A: %s\r\n" % (b"a" * 4000), b"401"),
    ],
    ids=["target", "headers", "extension", "trailers"],
)
async def test_what_surrounds_a_body_is_bounded(
    apis: EndlessApis, before: bytes, piece: bytes, status: bytes
) -> None:
    """No part of a request but its body grows without end, whether or not a key was shown."""
    client = await apis.raw(before)
    with contextlib.suppress(ConnectionError):
        for _ in range(32 * MAX_HEAD_BYTES // len(piece)):
            await client.send(piece)
            await asyncio.sleep(0)
    stated = await client.ended()
    assert [line[9:12] for line in stated.split(b"\r\n") if line.startswith(b"HTTP/1.1")] in ([status], [])


def narrow(apis: EndlessApis) -> socket.socket:
    """Ask for an endless answer through a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    sock.connect(("127.0.0.1", int(apis.http.address.rsplit(":", 1)[1])))
    sock.sendall(ASK)
    return sock


async def given_up(apis: EndlessApis, clock: Clock) -> None:
    """Let hours pass until no answer is held."""
    await until(lambda: clock.advance(HOUR) or not apis.service.open, "the answer to end")


@patience("read_s")
async def test_an_http_client_that_does_not_read_is_given_up(apis: EndlessApis, clock: Clock) -> None:
    """A client that does not read delays no other; then its answer is cancelled and its connection closed."""
    with narrow(apis):
        await apis.service.until(1)
        await apis.seen()
        assert apis.service.open == 1
        await given_up(apis, clock)


def late(apis: EndlessApis, clock: Clock, seconds: float) -> None:
    """Let the server stand still for a time, and look at its deadlines before it reads anything."""
    clock.advance(seconds)
    for each in apis.http.connections.held():
        each.check(asyncio.get_running_loop().time())


@patience("head_s")
@pytest.mark.parametrize("first", [b"", HEALTH[:20]], ids=["nothing", "half a head"])
async def test_what_lies_unread_at_the_deadline_is_read(apis: EndlessApis, clock: Clock, first: bytes) -> None:
    """A request that came while the server stood still is answered; one that is still not whole ends then."""
    whole, half = await apis.raw(first), await apis.raw(first)
    await apis.seen()
    whole.writer.write(HEALTH[len(first) :])
    half.writer.write(HEALTH[len(first) : -2])
    for _ in range(3):
        late(apis, clock, 2 * HOUR)
    assert (await whole.answer())[0] == 200
    await apis.seen()
    clock.advance(2 * HOUR)
    assert (await half.ended()).startswith(b"HTTP/1.1 408")
    whole.close()
    half.close()


@patience("read_s")
async def test_a_client_that_took_what_there_was_is_not_given_up(apis: EndlessApis, clock: Clock) -> None:
    """An answer continues for a client that has read all that the paused server had sent."""
    with narrow(apis) as sock:
        await apis.service.until(1)
        await apis.seen()
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sock.recv(2**20):
                pass
        late(apis, clock, 2 * HOUR)
        await apis.seen()
        assert apis.service.open == 1


async def test_a_connection_whose_request_lies_unread_makes_no_room(apis: EndlessApis) -> None:
    """A connection with an unread request counts as used: at the limit, a new connection is refused."""
    clients = [await apis.raw() for _ in range(BOUND)]
    await until(lambda: len(apis.http.connections.held()) == BOUND, "all connections")
    for each in clients:
        each.writer.write(HEALTH)
    assert not apis.http.connections.has_room()
    for each in clients:
        assert (await each.answer())[0] == 200
        each.close()


async def test_a_refused_client_reads_why(apis: EndlessApis) -> None:
    """A client that sends its request after the refusal reads 503 with a time to try again, and no reset."""
    waiting = [await apis.raw(WAIT) for _ in range(BOUND)]
    await apis.service.until(BOUND)
    refused = await apis.raw()
    async with bounded("the refusal"):
        head = await refused.reader.readuntil(b"retry-after: 1\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    for _ in range(3):
        await refused.send(ASK)
    refused.writer.write_eof()
    async with bounded("the end of the connection"):
        assert (await refused.reader.read()).endswith(b"connection: close\r\n\r\n")
    for each in (*waiting, refused):
        each.close()


@patience("read_s")
async def test_a_grpc_client_that_does_not_read_is_given_up(apis: EndlessApis, clock: Clock) -> None:
    """The answer of a gRPC client that does not read, or goes, is cancelled; no call and no drain waits."""
    (_, gone), (_, writer) = [await connect(apis.rpc.address, window=0) for _ in range(2)]
    for each in (gone, writer):
        each.write(call(1) + message(1, pb.GenerateRequest(model=MODEL, text="HI")))
    await apis.service.until(2)
    gone.close()
    await apis.service.until(1)
    await given_up(apis, clock)
    async with (
        AsyncClient(apis.rpc.address) as client,
        contextlib.aclosing(client.generate(MODEL, "WAIT")) as events,
    ):
        assert (await anext(events)).model == MODEL
    assert await result_of(apis.rpc.drain(NEVER), "the drain")
    writer.close()


@patience("read_s")
async def test_a_grpc_client_that_did_not_take_the_first_message_gets_a_status(
    apis: EndlessApis, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The status follows the message when the client makes room at last."""
    reader, writer = await connect(apis.rpc.address, window=0)
    writer.write(call(1) + message(1, pb.GenerateRequest(model=MODEL, text="HI")))
    await apis.service.until(1)
    await given_up(apis, clock)
    writer.write(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1 << 20)))
    kinds = await result_of(until_ended(reader, 1), "the end of the call")
    assert kinds[0] == kinds[-1] == HEADERS
    assert DATA in kinds
    assert not caplog.records
    writer.close()


@patience("send_s")
@pytest.mark.parametrize("reason", ["CLIENT_STALLED", "SHUTTING_DOWN"])
async def test_a_grpc_request_that_does_not_come_is_refused(
    apis: EndlessApis, clock: Clock, reason: str
) -> None:
    """A call without a message ends with a named fault, also where a drain begins in the same moment."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with grpc.aio.insecure_channel(apis.rpc.address) as channel:
        reading = asyncio.create_task(channel.stream_stream(f"/{SERVICE_NAME}/Generate")(nothing()).read())
        await until(lambda: apis.rpc.calls.active, "the call")
        clock.advance(2 * HOUR)
        refused = asyncio.get_running_loop().create_future()
        if reason == "SHUTTING_DOWN":
            asyncio.get_running_loop().call_later(0, lambda: refused.set_result(apis.rpc.calls.drain()))
            await result_of(refused, "the begin of the drain")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await result_of(reading, "the end of the call")
    assert fault_of(caught.value).reason == reason
