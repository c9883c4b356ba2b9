"""A replica hears of generations from its builder, and goes on without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from inference_service.rpc.builder_news import BuilderNews
from loramux.builder.v1 import builder_pb2 as pb
from loramux.builder.v1 import builder_pb2_grpc as builder_grpc
from loramux_shared.faults import SettingsInvalid
from loramux_shared.rpc.server import RpcServer
from tests.support.s3_gateway import free_port


class Telling(builder_grpc.BuilderServiceServicer):
    """A builder that tells what it is given, and can hang up."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[int | None] = asyncio.Queue()
        self.asked: list[Any] = []

    async def WatchDeployment(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802
        """Tell generations until None ends the stream."""
        self.asked.append(request)
        while (generation := await self.news.get()) is not None:
            yield pb.WatchDeploymentResponse(deployment=pb.Deployment(generation=generation))


async def serve(builder: Telling, port: int) -> RpcServer:
    """Start the builder."""
    register = partial(builder_grpc.add_BuilderServiceServicer_to_server, builder)
    server = RpcServer(f"127.0.0.1:{port}", {"loramux.builder.v1.BuilderService": register})
    await server.start()
    return server


async def until(condition: Any) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_each_generation_is_heard_of_once() -> None:
    """Changes of a build are no news; another generation is, also after the stream ended."""
    builder, heard, port = Telling(), list[int](), free_port()
    server = await serve(builder, port)
    news = BuilderNews(f"127.0.0.1:{port}", "d", lambda: heard.append(1), first_pause_s=0.02)
    task = asyncio.create_task(news.run())
    for generation in (3, 3, 4, 4):
        builder.news.put_nowait(generation)
    await until(lambda: len(heard) == 2)
    builder.news.put_nowait(None)
    builder.news.put_nowait(4)
    builder.news.put_nowait(5)
    await until(lambda: len(heard) == 3)
    assert len(builder.asked) == 2
    assert (builder.asked[0].name, builder.asked[0].follow, builder.asked[0].changes_only) == ("d", True, True)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.drain(0)


async def test_a_builder_that_is_away_is_said_once_and_called_again() -> None:
    """The log has one line when it is gone and one when it is back; news come from then on."""
    builder, heard, port = Telling(), list[int](), free_port()
    with capture_logs() as logs:
        news = BuilderNews(f"127.0.0.1:{port}", "d", lambda: heard.append(1), first_pause_s=0.02)
        task = asyncio.create_task(news.run())
        await until(lambda: logs)
        await asyncio.sleep(0.3)
        server = await serve(builder, port)
        builder.news.put_nowait(7)
        await until(lambda: heard)
        await until(lambda: len(logs) >= 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.drain(0)
    events = [line["event"] for line in logs if "builder tells" in line["event"]]
    assert events == [
        "the builder tells of no generations, the store is asked instead",
        "the builder tells of generations again",
    ]


async def test_an_address_that_is_none_is_a_bad_setting() -> None:
    """It is named at the first call, and not tried for ever."""
    with pytest.raises(SettingsInvalid, match="HOST:PORT"):
        await BuilderNews("http://builder", "d", lambda: None).run()
