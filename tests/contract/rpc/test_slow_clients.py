"""Clients that send or read slowly, or not at all, on both doors; every time-out is short here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from inference_service.openai_api import protocol
from inference_service.openai_api.protocol import MAX_HEAD_BYTES
from inference_service.rpc.servicer import SERVICE_NAME
from loramux import AsyncClient
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.access.guard import Guard
from loramux_shared.faults import ClientStalled
from loramux_shared.rpc import calls
from loramux_shared.rpc.status import fault_of
from tests.support.access import keyring
from tests.support.endless import MODEL, Doors
from tests.support.raw_http import JSON
from tests.support.raw_http2 import call, connect, message

SOON_S = 0.3
BODY = json.dumps({"model": MODEL, "prompt": "HI", "stream": True}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\n" + JSON
ASK = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest_asyncio.fixture
async def doors(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Doors]:
    """Doors with the patience that a test gives, by the name of a time."""
    given = getattr(request, "param", {})
    guard = Guard(keyring("infer")[1]) if given.get("keys") else Guard()
    http = protocol.Patience(**{name: value for name, value in given.items() if name in HTTP_TIMES})
    rpc = calls.Patience(**{name: value for name, value in given.items() if name in RPC_TIMES})
    async with Doors(tmp_path, guard, http, rpc) as made:
        yield made


HTTP_TIMES = protocol.Patience.__dataclass_fields__
RPC_TIMES = calls.Patience.__dataclass_fields__


def patience(**given: object) -> pytest.MarkDecorator:
    """Doors with these times."""
    return pytest.mark.parametrize("doors", [given], indirect=True, ids=[""])


@patience(head_s=SOON_S)
async def test_a_connection_that_asks_nothing_is_closed(doors: Doors) -> None:
    """One that was never used ends without a word, and so does one that sends empty lines for ever."""
    silent, empty = await doors.raw(), await doors.raw(b"\r\n")
    assert await silent.ended() == b""
    await empty.send(b"\r\n")
    assert await empty.ended() == b""


@patience(idle_s=SOON_S)
async def test_a_connection_is_not_kept_for_ever(doors: Doors) -> None:
    """After an answer it waits for the next request, and empty lines are none."""
    client = await doors.raw(HEALTH)
    assert (await client.answer())[0] == 200
    await client.send(b"\r\n")
    assert await client.ended() == b""


@patience(head_s=SOON_S)
@pytest.mark.parametrize("before", [b"", HEALTH])
async def test_a_slow_head_is_refused(doors: Doors, before: bytes) -> None:
    """A head that trickles is 408 after its time, on a new connection and on a kept one."""
    client = await doors.raw(before)
    if before:
        await client.answer()
    began = time.monotonic()
    for byte in b"GET /health HTTP/1.1\r\nX-A:":
        await client.send(bytes([byte]))
        await asyncio.sleep(0.05)
        if time.monotonic() - began > 2 * SOON_S:
            break
    status, body = await client.answer()
    assert status == 408
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert await client.ended() == b""


@patience(body_s=SOON_S)
async def test_a_slow_body_is_refused(doors: Doors) -> None:
    """A body that does not come is 408; nothing was begun for it."""
    client = await doors.raw(ASK[:-5])
    status, _ = await client.answer()
    assert status == 408
    assert await client.ended() == b""


@patience(body_s=SOON_S, keys=True)
async def test_a_body_behind_a_refusal_is_not_read_for_ever(doors: Doors) -> None:
    """Who was told 401 may not go on sending chunks as long as it likes."""
    client = await doors.raw(CHUNKED)
    assert (await client.answer())[0] == 401
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            await client.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.02)
    assert await client.ended(0.1) == b""


@patience(keys=True)
@pytest.mark.parametrize(
    ("before", "piece", "status"),
    [
        (b"GET /", b"a" * 4096, b"431"),
        (b"GET / HTTP/1.1\r\nX-A: ", b"a" * 4096, b"431"),
        (b"GET / HTTP/1.1\r\n", b"X-A: %s\r\n" % (b"a" * 4000), b"431"),
        (CHUNKED, b"1;" + b"a" * 4096, b"401"),
        (CHUNKED, b"1;%s\r\nx\r\n" % (b"a" * 4096), b"401"),
        (CHUNKED + b"0\r\n", b"X-A: %s\r\n" % (b"a" * 4000), b"401"),
        (CHUNKED + b"0\r\nX-A: ", b"a" * 4096, b"401"),
    ],
    ids=["target", "header", "headers", "extension", "extensions", "trailers", "trailer"],
)
async def test_what_surrounds_a_body_is_bounded(
    doors: Doors, before: bytes, piece: bytes, status: bytes
) -> None:
    """No part of a request but its body grows without end, whether or not a key was shown."""
    client = await doors.raw(before)
    with contextlib.suppress(ConnectionError):
        for _ in range(32 * MAX_HEAD_BYTES // len(piece)):
            await client.send(piece)
            await asyncio.sleep(0)
    said = await client.ended()
    assert [line[9:12] for line in said.split(b"\r\n") if line.startswith(b"HTTP/1.1")] in ([status], [])


async def test_chunks_of_one_byte_are_no_attack(doors: Doors) -> None:
    """Small chunks are framing for the most part, and taken."""
    body = BODY[:-1] + b" " * 100_000 + b"}"
    client = await doors.raw(CHUNKED)
    await client.send(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert (await client.reader.readline()).startswith(b"HTTP/1.1 200")
    client.close()


def narrow(doors: Doors) -> socket.socket:
    """Ask for an endless answer through a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    sock.connect(("127.0.0.1", int(doors.http.address.rsplit(":", 1)[1])))
    sock.sendall(ASK)
    return sock


@patience(read_s=SOON_S)
async def test_an_http_client_that_does_not_read_is_given_up(doors: Doors) -> None:
    """Its answer is ended, and its connection closed."""
    with narrow(doors):
        await doors.service.until(1)
        await doors.service.until(0)


@patience(read_s=6 * SOON_S)
async def test_an_http_client_that_reads_slowly_is_served(doors: Doors) -> None:
    """One that takes something now and then is waited for."""
    loop = asyncio.get_running_loop()
    with narrow(doors) as sock:
        await doors.service.until(1)
        sock.setblocking(False)
        for _ in range(8):
            await asyncio.sleep(SOON_S)
            left = 128 * 1024
            while left > 0:
                taken = len(await loop.sock_recv(sock, left))
                assert taken
                left -= taken
        assert doors.service.open == 1


@patience(read_s=SOON_S)
async def test_a_grpc_client_that_does_not_read_is_given_up(doors: Doors) -> None:
    """Its answer is ended, though its connection answers pings; it is told why when it reads on."""
    reader, writer = await connect(doors.rpc.address, window=0)
    writer.write(call(1) + message(1, pb.GenerateRequest(model=MODEL, text="HI")))
    await doors.service.until(1)
    await doors.service.until(0)
    assert await doors.rpc.drain(1)
    writer.close()
    del reader


@patience(read_s=SOON_S)
async def test_a_grpc_client_that_stops_reading_learns_why(doors: Doors) -> None:
    """The status comes behind what the client had not read."""
    async with AsyncClient(doors.rpc.address) as client:
        events = client.generate(MODEL, "HI")
        await anext(events)
        await doors.service.until(0)
        with pytest.raises(ClientStalled):
            async for _ in events:
                pass


@patience(send_s=SOON_S)
async def test_a_grpc_request_that_does_not_come_is_refused(doors: Doors) -> None:
    """A call whose message stays away ends with a name."""
    async with grpc.aio.insecure_channel(doors.rpc.address) as channel:
        stub = channel.stream_stream(
            f"/{SERVICE_NAME}/Generate", response_deserializer=pb.GenerateResponse.FromString
        )
        open_ = asyncio.Event()

        async def nothing() -> AsyncIterator[bytes]:
            await open_.wait()
            yield b""

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub(nothing()):
                pass
    assert fault_of(caught.value).reason == "CLIENT_STALLED"


@pytest.mark.parametrize(("sent", "reason"), [([], "REQUEST_INVALID"), ([b"\xff\xff"], "REQUEST_INVALID")])
async def test_a_grpc_call_without_a_request_is_refused(doors: Doors, sent: list[bytes], reason: str) -> None:
    """No message, and bytes that are none."""
    async with grpc.aio.insecure_channel(doors.rpc.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in channel.stream_stream(f"/{SERVICE_NAME}/Generate")(iter(sent)):
                pass
    assert fault_of(caught.value).reason == reason
