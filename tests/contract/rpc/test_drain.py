"""What a drain does to requests that are not done in time: each is told SHUTTING_DOWN, once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inference_service.rpc.servicer import SERVICE_NAME
from loramux import AsyncClient
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.faults import ShuttingDown
from loramux_shared.rpc.status import fault_of
from loramux_shared.rpc.stopping import leave
from tests.support.endless import MODEL, Doors
from tests.support.raw_http import JSON

WAIT = {"model": MODEL, "prompt": "WAIT"}


@pytest_asyncio.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    """Doors of a service whose answers never end."""
    async with Doors(tmp_path) as made:
        yield made


async def test_an_http_request_that_is_cut_is_told_so(doors: Doors) -> None:
    """Before its answer has begun it is 503 in the shape of all errors, with a time to try again."""
    async with httpx.AsyncClient(base_url=f"http://{doors.http.address}") as web:
        asking = asyncio.create_task(web.post("/v1/completions", json=WAIT))
        await doors.service.until(1)
        assert not await doors.http.drain(0.1)
        answer = await asking
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "shutting_down"
    await doors.rpc.drain(0)


async def test_a_grpc_call_that_is_cut_is_told_so(doors: Doors) -> None:
    """Its status has the reason, behind what it was already given."""
    async with AsyncClient(doors.rpc.address) as client:
        events = client.generate(MODEL, "WAIT")
        await anext(events)
        draining = asyncio.create_task(doors.rpc.drain(0.1))
        with pytest.raises(ShuttingDown):
            async for _ in events:
                pass
        assert not await draining
    await doors.http.drain(0)


async def test_a_server_that_leaves_goes_on(doors: Doors) -> None:
    """Health says no at both doors at once, to those who watch it too; requests are taken until the drain."""
    await doors.rpc.set_serving(True)
    async with (
        grpc.aio.insecure_channel(doors.rpc.address) as channel,
        httpx.AsyncClient(base_url=f"http://{doors.http.address}") as web,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        leaving = asyncio.create_task(leave([doors.http, doors.rpc], 3600))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for path in ("/health", "/ping"):
            answer = await web.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert (await web.get("/v1/models")).status_code == 200
        async with AsyncClient(doors.rpc.address) as client:
            events = client.generate(MODEL, "WAIT")
            assert (await anext(events)).model == MODEL
            assert not leaving.done()
            leaving.cancel()
            await doors.rpc.drain(0)
            with pytest.raises(ShuttingDown):
                _ = [event async for event in events]
        await doors.http.drain(0)


async def test_a_server_that_breaks_leaves_no_longer() -> None:
    """Nobody waits for proxies where there is nothing left to ask."""
    await asyncio.wait_for(leave([], 3600, asyncio.sleep(0)), 10)


async def test_an_unfinished_body_does_not_hold_a_drain(doors: Doors) -> None:
    """Nothing was begun for it: it is told SHUTTING_DOWN after a second, and nothing was cut."""
    client = await doors.raw(b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n\r\n{")
    await asyncio.sleep(0.05)
    began = time.monotonic()
    assert await doors.http.drain(20)
    assert time.monotonic() - began < 5
    status, body = await client.answer()
    assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
    assert await client.ended() == b""
    await doors.rpc.drain(0)


async def test_an_unfinished_request_does_not_hold_a_drain(doors: Doors) -> None:
    """The same over gRPC."""
    async with grpc.aio.insecure_channel(doors.rpc.address) as channel:

        async def never() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        stub = channel.stream_stream(
            f"/{SERVICE_NAME}/Generate", response_deserializer=pb.GenerateResponse.FromString
        )
        call = stub(never())
        asking = asyncio.create_task(call.read())
        await call.wait_for_connection()
        await asyncio.sleep(0.05)
        began = time.monotonic()
        assert await doors.rpc.drain(20)
        assert time.monotonic() - began < 5
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking
    assert isinstance(fault_of(caught.value), ShuttingDown)
    await doors.http.drain(0)
