"""Connections: sizes, compression, pings and Unix sockets, and more of them than a server takes."""

import asyncio
import json
import multiprocessing
import os
import resource
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux import AsyncClient
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.faults import RequestInvalid
from loramux_shared.process import log_to_stderr, raise_limit
from loramux_shared.rpc import options
from loramux_shared.rpc.options import LEAST_PING_S, MAX_REQUEST_BYTES, PING_S
from loramux_shared.rpc.server import RpcServer
from tests.contract.rpc.raw_http2 import ASK_PING, CANCEL, GOAWAY, PING, RESET, call, connect, frame, hello
from tests.contract.rpc.test_drain import apis as apis
from tests.support.access import Certificates
from tests.support.processes.forks import Forked
from tests.support.raw_http import JSON, RawClient
from tests.support.services.endless import BOUND, HEALTH, MODEL, Endless, EndlessApis, apis_of
from tests.support.services.fake_grpc import WORDS, FakeInference, inference_server
from tests.support.waiting import BOUND_S, bounded

WAIT = json.dumps({"model": MODEL, "prompt": "WAIT", "stream": True}).encode()
ASK = b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(WAIT) + WAIT
LIST = b"/loramux.inference.v1.InferenceService/ListModels"


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    """A scripted inference service."""
    made = inference_server("127.0.0.1:0", FakeInference())
    await made.start()
    yield made
    await made.drain(BOUND_S)


async def test_a_request_above_the_cap_is_not_sent(server: RpcServer) -> None:
    """The client refuses a request that no server takes, with both numbers, and continues."""
    async with AsyncClient(server.address) as client:
        with pytest.raises(
            RequestInvalid, match=rf"has 8\d{{6}} bytes; a server takes at most {MAX_REQUEST_BYTES}"
        ):
            await client.complete("base", "x" * MAX_REQUEST_BYTES)
        assert (await client.complete("base", "x" * 1_000_000)).text.startswith("".join(WORDS))


async def test_a_unix_socket(tmp_path: Path) -> None:
    """A server listens on a Unix socket, and a client reaches it there."""
    server = inference_server(f"unix:{tmp_path}/api", FakeInference())
    assert await server.start() == f"unix:{tmp_path}/api"
    try:
        async with AsyncClient(server.address) as client:
            assert [model.name for model in await client.models()] == ["base", "lora1", "lora2"]
    finally:
        await server.drain(BOUND_S)


async def test_a_client_that_pings_often_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings as often as the server allows are answered; gRPC's default answers the third with GOAWAY."""
    assert LEAST_PING_S < PING_S
    monkeypatch.setattr(options, "LEAST_PING_S", 0)
    server = inference_server("127.0.0.1:0", FakeInference())
    reader, writer = await connect(await server.start())
    answered = 0
    async with bounded("answers to pings", lambda: answered):
        for _ in range(9):
            writer.write(ASK_PING)
            kind = flags = 0
            while (kind, flags) != (PING, 1):
                head = await reader.readexactly(9)
                kind, flags = head[3], head[4]
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                assert kind != GOAWAY
            answered += 1
    writer.close()
    await server.drain(BOUND_S)


async def test_small_answers_are_sent_at_once(apis: EndlessApis) -> None:
    """Connections have TCP_NODELAY, so that an answer in two writes does not wait for an acknowledgement."""
    client = await apis.raw(HEALTH)
    assert (await client.answer())[0] == 200
    [connection] = apis.http.connections.held()
    sock = connection.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    client.close()


async def test_the_longest_unused_connection_makes_room(apis: EndlessApis) -> None:
    """Idle ones and half heads give way, oldest first; one that is being answered does not."""
    busy = await apis.raw(ASK)
    await apis.service.until(1)
    idle = [await apis.raw(b"GET /" if index % 2 else b"") for index in range(BOUND - 1)]
    late = await apis.raw(HEALTH)
    assert (await late.answer())[0] == 200
    assert await idle[0].ended() == b""
    await idle[-1].send(HEALTH)
    assert (await idle[-1].answer())[0] == 200
    assert (await busy.reader.readline()).startswith(b"HTTP/1.1 200")
    for each in (busy, late, *idle):
        each.close()


@pytest.mark.parametrize("secured", [False, True])
async def test_silent_connections_that_come_at_once_make_room(secured: bool, tmp_path: Path) -> None:
    """A client is answered whose connection waits behind more of them than the server may hold."""
    guard = Guard(None, Certificates(tmp_path).server) if secured else NOBODY_GUARDS
    context = ssl.create_default_context(cafile=tmp_path / "ours.pem") if secured else None
    async with EndlessApis(tmp_path, guard) as apis:
        host, port = apis.http.address.rsplit(":", 1)
        *silent, late = (socket.create_connection((host, int(port))) for _ in range(3 * BOUND))
        name = host if secured else None
        client = RawClient(*await asyncio.open_connection(sock=late, ssl=context, server_hostname=name))
        await client.send(HEALTH)
        assert (await client.answer())[0] == 200
        assert len(apis.http.connections.held()) <= BOUND
        client.close()
        for each in silent:
            each.close()


async def test_a_connection_that_is_being_opened_counts_once(apis: EndlessApis) -> None:
    """A server that holds a little more than half of its bound is full in no turn of the loop."""
    host, port = apis.http.address.rsplit(":", 1)
    clients = [socket.create_connection((host, int(port))) for _ in range(BOUND // 2 + 1)]
    for _ in range(20):
        await asyncio.sleep(0)
        assert apis.http.connections.has_room()
    assert len(apis.http.connections.held()) == len(clients)
    for each in clients:
        each.close()


def _read_pong(sock: socket.socket) -> None:
    """Return when the server has read all that was sent before a ping."""
    data = b""
    while ASK_PING[:4] + b"\x01" not in data:
        data = data[-9:] + sock.recv(65536)


async def test_calls_that_are_reset_do_not_cancel_those_of_others(apis: EndlessApis) -> None:
    """Thousands of calls that are opened and reset cost time, and no other call."""
    host, port = apis.rpc.address.rsplit(":", 1)
    streams = range(1, 2400, 2)
    async with AsyncClient(apis.rpc.address) as client:
        await client.models()
        floods = [socket.create_connection((host, int(port)), timeout=BOUND_S) for _ in range(4)]
        for each in floods:
            each.sendall(hello() + b"".join(call(stream, LIST) for stream in streams) + ASK_PING)
        for each in floods:
            _read_pong(each)  # while the loop stands still, and no call has its handler
        requests = [asyncio.create_task(client.models()) for _ in range(100)]
        await asyncio.sleep(0)
        for each in floods:
            each.sendall(b"".join(frame(RESET, 0, stream, CANCEL) for stream in streams))
        answers = await asyncio.gather(*requests, return_exceptions=True)
    for each in floods:
        each.close()
    assert [each for each in answers if isinstance(each, BaseException)] == []


def serve_with_few_descriptors(limit: int, log: Path, peer: Connection) -> None:
    """Serve until killed, with so many descriptors; tells the other end its addresses."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    log_to_stderr("json")
    asyncio.run(_serve(limit, peer))


async def _serve(limit: int, peer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))
    raise_limit()
    with tempfile.TemporaryDirectory() as folder:
        http, rpc = apis_of(Endless(Path(folder)))
        addresses = {"http": await http.start(), "grpc": await rpc.start()}
        await rpc.set_serving(True)
        peer.send(addresses)
        await asyncio.Event().wait()


def test_idle_connections_do_not_stop_the_server(tmp_path: Path) -> None:
    """The endpoints answer with 256 descriptors and 300 idle connections, and the log stays short."""
    ours, theirs = multiprocessing.Pipe()
    process = Forked(serve_with_few_descriptors, 256, tmp_path / "log", theirs)
    theirs.close()
    idle: list[socket.socket] = []
    try:
        addresses = ours.recv()
        host, port = addresses["http"].rsplit(":", 1)
        idle += (socket.create_connection((host, int(port)), timeout=BOUND_S) for _ in range(300))
        assert httpx.get(f"http://{addresses['http']}/health", timeout=BOUND_S).status_code == 200
        with grpc.insecure_channel(addresses["grpc"]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            status = health.Check(health_pb2.HealthCheckRequest(), timeout=BOUND_S).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    finally:
        for each in idle:
            each.close()
        process.kill()
        process.wait(BOUND_S)
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert events == ["limit on open files raised", "connections are at their bound"]
