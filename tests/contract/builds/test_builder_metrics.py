"""The builder's metrics, and news of its generations for replicas."""

import asyncio
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from structlog.testing import capture_logs

from builder_service.builds import meter as metrics
from builder_service.builds.meter import MAX_CLIENTS, BuildMeter, MetricsServer
from inference_service.rpc import builder as builder_news
from inference_service.rpc.builder import FIRST_PAUSE_S, BuilderNews
from loramux.builder.v1 import builder_pb2 as pb, builder_pb2_grpc as builder_grpc
from loramux_shared.faults import SettingsInvalid
from loramux_shared.rpc.server import RpcServer
from tests.support.builders import Builders
from tests.support.metrics import Scrape
from tests.support.s3_gateway import free_port
from tests.support.waiting import BOUND_S, until, wait_until


async def scrape(address: str) -> Scrape:
    """The metrics at an address."""
    async with httpx.AsyncClient(timeout=BOUND_S) as web:
        return Scrape((await web.get(f"http://{address}/metrics")).text)


async def test_builds_are_counted_by_outcome(tmp_path: Path) -> None:
    """A build that runs is running; one that ends is counted under OK or its reason, with its seconds."""
    world = Builders(tmp_path)
    world.store.gate.clear()
    builds = world.builder()
    address = builds.meter.listen("127.0.0.1:0", insecure=False)
    await builds.build(world.deployment("one"))
    busy = await scrape(address)
    assert busy.value("loramux_builds_running") == 1
    assert busy.series("loramux_builds_total") == []
    await builds.build(world.deployment("bad", name="other"))
    await world.close()
    done = await scrape(address)
    assert done.value("loramux_builds_running") == 0
    assert done.value("loramux_builds_total", outcome="OK") == 1
    assert done.value("loramux_builds_total", outcome="ADAPTER_INVALID") == 1
    assert done.value("loramux_build_seconds_count") == 2
    assert done.value("loramux_build_seconds_sum") > 0
    assert not any(name in done.text for name in ("tiny", "other"))


@pytest.mark.parametrize("address", ["0.0.0.0:0", "unix:/tmp/metrics"])
def test_it_is_not_opened_to_others_by_accident(address: str) -> None:
    """The metrics endpoint requires no key, so it listens on loopback unless a setting allows others."""
    with pytest.raises(SettingsInvalid, match="or LORAMUX_INSECURE=1"):
        BuildMeter(lambda: 0).listen(address, insecure=False)
    if not address.startswith("unix"):
        assert BuildMeter(lambda: 0).listen(address, insecure=True).startswith("0.0.0.0:")


def test_an_address_that_is_taken() -> None:
    """The message names the setting and the value."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsInvalid, match=rf"LORAMUX_METRICS=127\.0\.0\.1:{port}: .*free HOST:PORT"):
            BuildMeter(lambda: 0).listen(f"127.0.0.1:{port}", insecure=False)


class Clocks(list[Callable[[], None]]):
    """The timers of a module: each fires when the test fires it."""

    def timer(self, _: float, fire: Callable[..., None], provided: tuple[object, ...]) -> threading.Thread:
        """Stand for threading.Timer."""
        self.append(partial(fire, *provided))
        made = threading.Thread()
        made.cancel = lambda: None  # type: ignore[attr-defined]
        return made


def test_silent_clients_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients beyond the bound are closed at once, silent ones after their time; then others are answered."""
    clocks = Clocks()
    monkeypatch.setattr(metrics, "threading", Mock(wraps=threading, Timer=clocks.timer))
    registry = CollectorRegistry()
    Gauge("seen", "1.", registry=registry).set(1)
    api = MetricsServer("127.0.0.1", 0, registry)
    api.start()
    address = ("127.0.0.1", api.server_port)
    try:
        idle = [socket.create_connection(address, timeout=BOUND_S) for _ in range(2 * MAX_CLIENTS)]
        wait_until(
            lambda: len(closed_of(idle)) == MAX_CLIENTS == len(clocks), "the end of those beyond the bound"
        )
        for fire in clocks:
            fire()
        assert [each.recv(1) for each in idle] == [b""] * len(idle)
        for each in idle:
            each.close()
        assert "seen 1.0" in wait_until(lambda: answer_of(address), "a place for another client")
    finally:
        api.shutdown()
        api.server_close()


def closed_of(connections: list[socket.socket]) -> list[socket.socket]:
    """The connections that the other end has closed."""
    return select.select(connections, [], [], 0)[0]


def answer_of(address: tuple[str, int]) -> str:
    """Return the answer at an address; empty where the connection is closed unread."""
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{address[0]}:{address[1]}/metrics", timeout=BOUND_S).text
    return ""


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
        """Listen while the block runs."""
        task = asyncio.create_task(BuilderNews(f"127.0.0.1:{self.port}", "d", self.hears).run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Run the builder while the block runs."""
        register = partial(builder_grpc.add_BuilderServiceServicer_to_server, self.builder)
        server = RpcServer(f"127.0.0.1:{self.port}", {"loramux.builder.v1.BuilderService": register})
        await server.start()
        try:
            yield
        finally:
            await server.drain(0)

    def hears(self) -> None:
        """Count another generation."""
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
