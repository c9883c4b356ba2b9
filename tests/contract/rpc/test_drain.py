"""The end of open, half sent and new requests in a drain: each gets SHUTTING_DOWN, once."""

import asyncio
import gc
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inference_service.api.rpc.servicer import SERVICE_NAME
from loramux import AsyncClient
from loramux_shared.faults import ShuttingDown
from loramux_shared.rpc import calls, server
from loramux_shared.rpc.status import fault_of
from loramux_shared.rpc.stopping import Stop, leave, shielded
from tests.support.raw_http import JSON, RawClient
from tests.support.services.endless import BOUND, MODEL, EndlessApis
from tests.support.waiting import BOUND_S, Clock, result_of, until

HOUR, NEVER = 3600.0, 1e9
WAIT = {"model": MODEL, "prompt": "WAIT"}
VERSION = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = json.dumps(WAIT).encode()
ASK = b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
REFUSED = (503, True, "shutting_down")


@pytest.fixture
async def apis(tmp_path: Path) -> AsyncIterator[EndlessApis]:
    """The endpoints of a service with endless answers; clients have as long as they like to send."""
    async with EndlessApis(tmp_path, rpc=calls.Patience(send_s=NEVER)) as made:
        yield made


async def refusal_of(client: RawClient) -> tuple[int, bool, str | None]:
    """The status of an answer, whether it says that the connection ends, as it then does, and its error."""
    raw = await client.ended()
    client.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    code = json.loads(body).get("error", {}).get("code") if body else None
    return int(head.split()[1]), b"connection: close" in head, code


async def passes(count: int = 3) -> None:
    """Let the loop, which also serves, handle received data."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_signals_that_come_at_once_count_once() -> None:
    """A supervisor sends several before the loop, which an import blocks, has handled the first."""
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    stop = Stop()
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
    assert await stop.wait() is signal.SIGTERM
    await passes()
    assert not raised


async def test_shielded_work_outlasts_its_caller() -> None:
    """Work whose caller left is not cancelled; when it fails then, asyncio logs nothing."""
    loop, raised = asyncio.get_running_loop(), list[object]()
    loop.set_exception_handler(lambda _, context: raised.append(context))
    gone = asyncio.create_task(shielded(work := loop.create_future()))
    await passes()
    gone.cancel()
    await passes()
    assert (gone.cancelled(), work.cancelled()) == (True, False)
    work.set_exception(ShuttingDown("failed"))
    await passes()
    del gone, work
    gc.collect()
    assert not raised


@pytest.mark.parametrize("prompt", ["WAIT", "MORE"])
async def test_a_grpc_call_that_is_cut_ends_with_the_reason(
    apis: EndlessApis, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    """A gRPC call that is cut ends with the reason as its status, also behind messages that are read late."""
    monkeypatch.setattr(server, "CUT_S", BOUND_S)
    async with AsyncClient(apis.rpc.address) as client:
        events = client.generate(MODEL, prompt)
        await anext(events)
        pieces = 0
        while apis.service.pieces > pieces:  # until nothing more is taken from the answer
            pieces = apis.service.pieces
            await client.models()
        draining = asyncio.create_task(apis.rpc.drain(0))
        with pytest.raises(ShuttingDown):
            async for _ in events:
                pass
        assert not await draining


async def test_a_server_that_leaves_goes_on(apis: EndlessApis) -> None:
    """Health says no at both endpoints until the delay is over, also to watchers; requests are taken."""
    clock = Clock()
    await apis.rpc.set_serving(True)
    async with (
        grpc.aio.insecure_channel(apis.rpc.address) as channel,
        httpx.AsyncClient(base_url=f"http://{apis.http.address}", timeout=BOUND_S) as web,
        AsyncClient(apis.rpc.address) as client,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        leaving = asyncio.create_task(leave([apis.http, apis.rpc], HOUR))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for path in ("/health", "/ping"):
            answer = await web.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert (await web.get("/v1/models")).status_code == 200
        assert (await anext(client.generate(MODEL, "WAIT"))).model == MODEL
        assert not leaving.done()
        clock.advance(HOUR)
        await result_of(leaving, "the end of the delay")


async def test_a_server_that_breaks_does_not_wait_for_proxies() -> None:
    """A delay ends when the watched task ends, and no sooner; the watch ends with the delay."""
    clock, broken, watching = Clock(), asyncio.Event(), asyncio.Event()

    async def watch() -> None:
        watching.set()
        try:
            await broken.wait()
        finally:
            watching.clear()

    for end in (broken.set, lambda: clock.advance(NEVER)):
        broken.clear()
        leaving = asyncio.create_task(leave([], NEVER, watch()))
        await watching.wait()
        assert not leaving.done()
        end()
        await result_of(leaving, "the end of the delay")
        await passes()
        assert not watching.is_set()


async def test_an_unfinished_body_does_not_hold_a_drain(apis: EndlessApis) -> None:
    """A request with an unfinished body gets SHUTTING_DOWN after a second of the drain."""
    clock = Clock()
    client = await apis.raw(b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"Content-Length: 9\r\n\r\n{")
    await apis.seen()
    draining = asyncio.create_task(apis.http.drain(NEVER))
    await passes()
    assert not draining.done()
    clock.advance(1)
    assert await result_of(draining, "the drain")
    assert await refusal_of(client) == REFUSED


async def test_an_unfinished_request_does_not_hold_a_drain(apis: EndlessApis) -> None:
    """The same holds over gRPC."""
    clock = Clock()

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with grpc.aio.insecure_channel(apis.rpc.address) as channel:
        call = channel.stream_stream(f"/{SERVICE_NAME}/Generate")(never())
        asking = asyncio.create_task(call.read())
        await call.wait_for_connection()
        await channel.unary_unary(f"/{SERVICE_NAME}/ListModels")(b"")  # comes behind it
        draining = asyncio.create_task(apis.rpc.drain(NEVER))
        await passes()
        assert not asking.done()
        clock.advance(1)
        assert await result_of(draining, "the drain")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking
    assert isinstance(fault_of(caught.value), ShuttingDown)


async def test_requests_that_wait_to_be_accepted_are_answered(apis: EndlessApis) -> None:
    """Requests in the listen queue are refused by name when a drain begins, those above the bound by 503."""
    host, port = apis.http.address.rsplit(":", 1)
    waiting = [socket.create_connection((host, int(port))) for _ in range(BOUND + 4)]
    for each in waiting:
        each.sendall(ASK)
    draining = asyncio.create_task(apis.http.drain(BOUND_S))
    clients = [RawClient(*await asyncio.open_connection(sock=each)) for each in waiting]
    answers = await asyncio.gather(*map(refusal_of, clients))
    assert answers == [REFUSED] * BOUND + [(503, True, None)] * 4
    assert await draining


async def test_a_request_that_crosses_the_end_is_answered(apis: EndlessApis) -> None:
    """A request on a kept connection that the server has just closed reads that it may be sent again."""
    client = await apis.raw(VERSION)
    assert (await client.answer())[0] == 200
    draining = asyncio.create_task(apis.http.drain(BOUND_S))
    peeked, transport = client.writer.get_extra_info("socket"), client.writer.transport
    transport.pause_reading()  # type: ignore[attr-defined]  # a transport of a socket has it
    await until(lambda: _has_come(peeked), "the server's last word")
    await client.send(ASK)
    await passes()
    transport.resume_reading()  # type: ignore[attr-defined]  # the same
    assert await refusal_of(client) == (408, True, "shutting_down")
    assert await draining


def _has_come(sock: Any) -> bool:
    with socket.socket(fileno=socket.dup(sock.fileno())) as same:
        same.setblocking(False)
        try:
            return bool(same.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False


async def test_an_endpoint_that_leaves_lets_connections_go(apis: EndlessApis) -> None:
    """Every answer says that its connection ends, also where the request came before."""
    retained, busy = await apis.raw(VERSION), await apis.raw(ASK)
    assert (await retained.answer())[0] == 200
    await apis.service.until(1)
    await apis.http.leave()
    await retained.send(VERSION)
    assert (await refusal_of(retained))[:2] == (200, True)
    draining = asyncio.create_task(apis.http.drain(0))
    assert await refusal_of(busy) == REFUSED
    assert not await draining


async def test_a_grpc_server_stops_when_none_comes(tmp_path: Path) -> None:
    """Late calls are refused by name a moment longer; calls while gRPC stops get no reason."""
    clock, patience = Clock(), calls.Patience(send_s=NEVER, quiet_s=HOUR, parting_s=NEVER)

    async def refused() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert isinstance(fault_of(caught.value), ShuttingDown)

    async with (
        EndlessApis(tmp_path, rpc=patience) as apis,
        grpc.aio.insecure_channel(apis.rpc.address) as channel,
    ):
        call = channel.unary_unary(f"/{SERVICE_NAME}/ListModels")
        await call(b"")
        await apis.rpc.refuse()
        await refused()
        draining = asyncio.create_task(apis.rpc.drain(NEVER))
        for _ in range(3):
            clock.advance(0.6 * HOUR)
            await refused()
        assert not draining.done()
        clock.advance(HOUR)
        assert await result_of(draining, "the drain")
