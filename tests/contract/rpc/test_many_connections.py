"""More connections than a door takes, and more than the process may open."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux import AsyncClient
from loramux.faults import ServerUnavailable
from tests.support import crowded
from tests.support.endless import BOUND, MODEL, Doors
from tests.support.forks import Forked
from tests.support.raw_http import JSON
from tests.support.raw_http2 import CANCEL, RESET, call, connect, frame, hello

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
WAIT = json.dumps({"model": MODEL, "prompt": "WAIT", "stream": True}).encode()
ASK = b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(WAIT) + WAIT


LIST = b"/loramux.inference.v1.InferenceService/ListModels"


@pytest_asyncio.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    """Doors that take few connections."""
    async with Doors(tmp_path) as made:
        yield made


async def test_small_answers_are_sent_at_once(doors: Doors) -> None:
    """Connections have TCP_NODELAY, so that an answer in two writes does not wait for an acknowledgement."""
    client = await doors.raw(HEALTH)
    assert (await client.answer())[0] == 200
    [connection] = doors.http._connections._held()
    sock = connection.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    client.close()


async def test_the_longest_unused_connection_makes_room(doors: Doors) -> None:
    """Idle ones and half heads give way, oldest first; one that is being answered does not."""
    busy = await doors.raw(ASK)
    await doors.service.until(1)
    idle = [await doors.raw(b"GET /" if index % 2 else b"") for index in range(BOUND - 1)]
    await asyncio.sleep(0.05)
    late = await doors.raw(HEALTH)
    assert (await late.answer())[0] == 200
    assert await idle[0].ended() == b""
    await idle[-1].send(HEALTH[5:] if (BOUND - 2) % 2 else HEALTH)
    assert (await idle[-1].answer())[0] in (200, 404)
    assert (await busy.reader.readline()).startswith(b"HTTP/1.1 200")
    for each in (busy, late, *idle):
        each.close()


async def test_a_door_whose_connections_are_all_busy_says_so(doors: Doors) -> None:
    """One more is 503 with a time to try again."""
    busy = [await doors.raw(ASK) for _ in range(BOUND)]
    await doors.service.until(BOUND)
    late = await doors.raw()
    assert (await late.answer())[0] == 503
    assert await late.ended() == b""
    for each in busy:
        each.close()


async def test_a_grpc_door_takes_so_many_connections(doors: Doors) -> None:
    """One more is closed at once, and a place that gets free is taken."""
    held = [await connect(doors.rpc.address) for _ in range(BOUND)]
    for reader, _ in held:
        await reader.readexactly(9)
    reader, writer = await connect(doors.rpc.address)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    for _, each in [*held, (reader, writer)]:
        each.close()
    async with asyncio.timeout(20):
        while not await _answers(doors.rpc.address):
            await asyncio.sleep(0.05)


async def _answers(address: str) -> bool:
    """Whether a door takes one more connection; it sees in its own time that others are closed."""
    async with AsyncClient(address) as client:
        try:
            return len(await client.models()) == 2
        except ServerUnavailable:
            return False


async def test_calls_that_are_reset_do_not_cancel_those_of_others(doors: Doors) -> None:
    """Thousands of calls that are opened and reset cost time, and nobody else's call."""
    host, port = doors.rpc.address.rsplit(":", 1)
    streams = range(1, 4000, 2)
    async with AsyncClient(doors.rpc.address) as client:
        await client.models()
        floods = [socket.create_connection((host, int(port))) for _ in range(4)]
        for each in floods:
            each.sendall(hello() + b"".join(call(stream, LIST) for stream in streams))
        time.sleep(0.3)
        asked = [asyncio.create_task(client.models()) for _ in range(100)]
        await asyncio.sleep(0.05)
        for each in floods:
            each.sendall(b"".join(frame(RESET, 0, stream, CANCEL) for stream in streams))
        answers = await asyncio.gather(*asked, return_exceptions=True)
    for each in floods:
        each.close()
    assert [each for each in answers if isinstance(each, BaseException)] == []


def test_idle_connections_do_not_stop_the_doors(tmp_path: Path) -> None:
    """With 256 descriptors and 300 idle connections both doors answer, and the log stays short."""
    ours, theirs = multiprocessing.Pipe()
    process = Forked(crowded.serves, 256, tmp_path / "log", theirs)
    theirs.close()
    try:
        addresses = ours.recv()
        host, port = addresses["http"].rsplit(":", 1)
        idle = [socket.create_connection((host, int(port)), timeout=20) for _ in range(300)]
        assert httpx.get(f"http://{addresses['http']}/health", timeout=20).status_code == 200
        with grpc.insecure_channel(addresses["grpc"]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            status = health.Check(health_pb2.HealthCheckRequest(), timeout=20).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        for each in idle:
            each.close()
    finally:
        process.kill()
        process.wait(10)
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert events == ["limit on open files raised", "connections are at their bound"]
