"""Connections to a server: sizes, compression, pings, Unix sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux import AsyncClient
from loramux.inference.v1 import inference_pb2 as pb
from loramux.inference.v1 import inference_pb2_grpc
from loramux_shared.faults import RequestInvalid
from loramux_shared.rpc.options import LEAST_PING_S, MAX_REQUEST_BYTES, PING_S
from loramux_shared.rpc.server import RpcServer
from tests.support.fake_services import WORDS, FakeInference, inference_server


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    """A scripted inference service."""
    made = inference_server("127.0.0.1:0", FakeInference())
    await made.start()
    await made.set_serving(True)
    yield made
    await made.drain(1)


async def test_a_request_above_the_cap_is_not_sent(server: RpcServer) -> None:
    """The client refuses a request that no server takes, with both numbers, and goes on."""
    async with AsyncClient(server.address) as client:
        with pytest.raises(
            RequestInvalid, match=rf"has 8\d{{6}} bytes; a server takes at most {MAX_REQUEST_BYTES}"
        ):
            await client.complete("base", "x" * MAX_REQUEST_BYTES)
        assert (await client.complete("base", "x" * 1_000_000)).text.startswith("".join(WORDS))


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_the_server_has_the_cap_too(server: RpcServer, compression: grpc.Compression) -> None:
    """Requests may be compressed, and one that is too large, once it is unpacked, ends its own call only."""
    async with grpc.aio.insecure_channel(server.address, compression=compression) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(pb.GenerateRequest(model="base", text="x" * 2 * MAX_REQUEST_BYTES)):
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        answer = [event async for event in stub.Generate(pb.GenerateRequest(model="base", text="x" * 100_000))]
        assert answer[-1].WhichOneof("event") == "finished"


async def test_a_unix_socket(tmp_path: Path) -> None:
    """A server listens on a Unix socket, and a client reaches it there."""
    server = inference_server(f"unix:{tmp_path}/door", FakeInference())
    assert await server.start() == f"unix:{tmp_path}/door"
    async with AsyncClient(server.address) as client:
        assert [model.name for model in await client.models()] == ["base", "lora1", "lora2"]
    await server.drain(1)


async def test_a_client_that_pings_often_stays(server: RpcServer) -> None:
    """A silent stream stays open under pings that gRPC's defaults answer with GOAWAY at the third."""
    assert LEAST_PING_S < 1.1 < PING_S
    options = (
        ("grpc.keepalive_time_ms", 1100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    async with grpc.aio.insecure_channel(server.address, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.read(), 4.8)
