"""What a door that drains says to who has connected, asks in that moment, or keeps a connection for later."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from inference_service.openai_api.front import Front
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.faults import ShuttingDown
from loramux_shared.rpc.calls import QUIET_S, CallInterceptor
from loramux_shared.rpc.status import fault_of
from tests.support.endless import BOUND, MODEL, Doors
from tests.support.raw_http import JSON, RawClient

VERSION = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
WAIT = json.dumps({"model": MODEL, "prompt": "WAIT"}).encode()
ASK = b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(WAIT) + WAIT


@pytest_asyncio.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    """Doors of a service whose answers never end."""
    async with Doors(tmp_path) as made:
        yield made


async def told(client: RawClient) -> tuple[int, bool, str | None]:
    """The status of an answer, whether it says that the connection ends, as it then does, and its error."""
    async with asyncio.timeout(5):
        raw = await client.reader.read()
    client.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    code = json.loads(body).get("error", {}).get("code") if body else None
    return int(head.split()[1]), b"connection: close" in head, code


async def test_who_waits_to_be_accepted_is_told(doors: Doors) -> None:
    """Requests in the listen queue are refused by name when a drain begins, those above the bound by 503."""
    host, port = doors.http.address.rsplit(":", 1)
    waiting = [socket.create_connection((host, int(port))) for _ in range(BOUND + 4)]
    for each in waiting:
        each.sendall(ASK)
    draining = asyncio.create_task(doors.http.drain(5))
    clients = [RawClient(*await asyncio.open_connection(sock=each)) for each in waiting]
    answers = await asyncio.gather(*map(told, clients))
    assert answers == [(503, True, "shutting_down")] * BOUND + [(503, True, None)] * 4
    assert await draining


async def test_a_request_that_crosses_the_end_is_told(doors: Doors) -> None:
    """It comes on a kept connection when the server has closed that; what it reads may be retried."""
    client = await doors.raw(VERSION)
    assert (await client.answer())[0] == 200
    draining = asyncio.create_task(doors.http.drain(5))
    peeked = client.writer.get_extra_info("socket")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of a socket has it
    while not _has_come(peeked):
        await asyncio.sleep(0.001)
    await client.send(ASK)
    await asyncio.sleep(0.05)
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]  # the same
    assert await told(client) == (408, True, "shutting_down")
    assert await draining


def _has_come(sock: Any) -> bool:
    with socket.socket(fileno=socket.dup(sock.fileno())) as same:
        same.setblocking(False)
        try:
            return bool(same.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False


async def test_half_a_head_is_told(doors: Doors) -> None:
    """Its request was begun, so it is refused as others are."""
    client = await doors.raw(VERSION[:20])
    await asyncio.sleep(0.02)
    draining = asyncio.create_task(doors.http.drain(5))
    assert await told(client) == (503, True, "shutting_down")
    assert await draining


async def test_a_door_that_leaves_lets_connections_go(doors: Doors) -> None:
    """Every answer says that its connection ends, also where the request came before."""
    kept, busy = await doors.raw(VERSION), await doors.raw(ASK)
    assert (await kept.answer())[0] == 200
    await doors.service.until(1)
    await doors.http.leave()
    await kept.send(VERSION)
    assert (await told(kept))[:2] == (200, True)
    draining = asyncio.create_task(doors.http.drain(0))
    assert await told(busy) == (503, True, "shutting_down")
    assert not await draining


async def test_what_is_refused_holds_no_drain_over_http() -> None:
    """Refusals that are not sent yet are nothing that a drain waits for, or cuts."""
    front, never = Front(_unasked, lambda _: None), asyncio.Event()

    async def send(_: Any) -> None:
        await never.wait()

    front.draining = True
    scope = {"type": "http", "path": "/version", "headers": []}
    asking = asyncio.create_task(front(scope, _unasked, send))
    await asyncio.sleep(0)
    assert await front.until_idle(0)
    never.set()
    await asking


async def test_what_is_refused_holds_no_drain_over_grpc() -> None:
    """The same."""
    interceptor, never = CallInterceptor(), asyncio.Event()

    class Context:
        """Of a call whose status cannot be sent."""

        async def abort(self, *_: Any) -> None:
            await never.wait()
            raise grpc.aio.AbortError

        def __getattr__(self, name: str) -> Any:
            return lambda *_: ()

    interceptor.drain()
    read = pb.ListModelsRequest.FromString
    handler = interceptor.wrap(grpc.unary_unary_rpc_method_handler(_unasked, read), "/a.B/C")
    asking = asyncio.create_task(handler.stream_unary(None, Context()))
    await asyncio.sleep(0)
    assert await interceptor.until_idle(0)
    never.set()
    with pytest.raises(grpc.aio.AbortError):
        await asking


async def _unasked(*_: Any) -> Any:
    raise AssertionError("nothing is asked")


async def test_a_grpc_server_stops_when_nobody_comes(doors: Doors) -> None:
    """Who goes on calling is refused by name for a moment more: what comes while gRPC stops hears no reason."""
    async with grpc.aio.insecure_channel(doors.rpc.address) as channel:
        call = channel.unary_unary("/loramux.inference.v1.InferenceService/ListModels")
        await call(b"")
        await doors.rpc.refuse()
        loop = asyncio.get_running_loop()
        before = loop.time()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert isinstance(fault_of(caught.value), ShuttingDown)
        assert await doors.rpc.drain(5)
        assert loop.time() - before >= QUIET_S
