"""News of a builder's generations for replicas."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from inference_service.api.rpc import builder as builder_news
from inference_service.api.rpc.builder import FIRST_PAUSE_S, BuilderNews
from loramux.builder.v1 import builder_pb2 as pb, builder_pb2_grpc as builder_grpc
from loramux_shared.rpc.server import RpcServer
from tests.support.s3_gateway import free_port
from tests.support.servers import serve
from tests.support.waiting import until


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


class Replica:
    """A replica that listens to a builder, whose pauses before another call end when a test ends them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.builder, self.port, self.heard = Telling(), free_port(), 0
        self.pauses: list[float] = []
        self.pausing, self.go = False, asyncio.Semaphore(0)

        async def paused(seconds: float) -> None:
            self.pauses.append(seconds)
            self.pausing = True
            await self.go.acquire()
            self.pausing = False

        monkeypatch.setattr(builder_news, "asyncio", SimpleNamespace(sleep=paused))
        monkeypatch.setattr(builder_news, "random", SimpleNamespace(uniform=lambda _, most: most))

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        task = asyncio.create_task(BuilderNews(f"127.0.0.1:{self.port}", "d", self.hears).run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def served(self) -> AbstractAsyncContextManager[RpcServer]:
        """Run the builder while the block runs."""
        register = partial(builder_grpc.add_BuilderServiceServicer_to_server, self.builder)
        services = {"loramux.builder.v1.BuilderService": register}
        return serve(RpcServer(f"127.0.0.1:{self.port}", services), 0)

    def hears(self) -> None:
        self.heard += 1


async def test_each_generation_is_heard_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of a build are no news; another generation is, also after the stream ended."""
    replica = Replica(monkeypatch)
    builder = replica.builder
    async with replica.served(), replica.listening():
        for generation in (3, 3, 4, 4, None):
            builder.news.put_nowait(generation)
        await until(lambda: replica.pauses, "the end of the stream")
        assert (replica.heard, replica.pauses) == (2, [FIRST_PAUSE_S])
        for generation in (4, 5, None):
            builder.news.put_nowait(generation)
        replica.go.release()
        await until(lambda: len(replica.pauses) == 2, "the end of the second stream")
        assert (replica.heard, len(builder.asked)) == (3, 2)
    [query, _] = builder.asked
    assert (query.name, query.follow, query.changes_only) == ("d", True, True)


async def test_a_builder_that_is_away_is_logged_once_and_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has one line when it is gone and one when it is back; pauses grow until it answers."""
    replica = Replica(monkeypatch)
    with capture_logs() as logs:
        async with replica.listening():
            for count in (1, 2, 3):
                await until(lambda count=count: len(replica.pauses) == count, "another call")
                replica.go.release()
            async with replica.served():
                for generation in (7, None):
                    replica.builder.news.put_nowait(generation)
                # The channel has pauses of its own between two connections.
                await until(lambda: replica.heard or (replica.pausing and replica.go.release()), "the news")
                await until(lambda: replica.pauses[-1] == FIRST_PAUSE_S, "the end of the stream")
    assert replica.pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    events = [line["event"] for line in logs if "builder reports" in line["event"]]
    assert events == [
        "builder reports no generations, reading the store instead",
        "builder reports generations again",
    ]
