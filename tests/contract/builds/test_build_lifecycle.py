"""How builds end before they are done, and what is left: cancels, deadlines, restarts, other builders."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builder_service.builds.builds import Builds
from builder_service.builds.journal import Abandoned, Journal, JournalEntry
from builder_service.builds.limits import BuildLimits
from builder_service.builds.views import DeploymentView, State
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from loramux.cli.main import app
from loramux.client import AsyncClient
from loramux.records import DeploymentState
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import DeploymentNotFound, QueueFull, RequestIdReused
from loramux_shared.rpc.server import RpcServer
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base

OWNER, OTHER = "0" * 16, "1" * 16


class Gated(MemoryStore):
    """Puts of bundles wait until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def put(self, key: str, data: bytes | Path) -> None:
        """Store when the gate is open."""
        if key.startswith("bundles/"):
            assert self.gate.wait(20)
        super().put(key, data)


class World:
    """A base and adapters on disk, and builders over one store."""

    def __init__(self, folder: Path) -> None:
        write_base(folder / "base")
        for i, name in enumerate(("one", "two")):
            write_adapter(folder / name, tensors(seed=i))
        write_adapter(folder / "bad", use_dora=True)
        self.folder, self.store = folder, Gated()
        self.started: list[Builds] = []

    def deployment(self, *names: str, name: str = "tiny") -> Deployment:
        """A deployment of adapters below the folder."""
        local = {adapter: {"source": "LOCAL", "repo": str(self.folder / adapter)} for adapter in names}
        base = {"source": "LOCAL", "repo": str(self.folder / "base")}
        data = {"model_name": name, "build": {"checkpoint_repository": base, "lora_adapters": local}}
        return parse_deployment(data).deployment

    def builder(self, owner: str = OWNER, **limits: float) -> Builds:
        """A builder that has not recovered yet."""
        context = BuildContext(
            self.store, open_sources(local_roots=[self.folder]), self.folder / "work", owner=owner
        )
        made = Builds(context, replace(BuildLimits(), **limits))
        self.started.append(made)
        return made


@pytest.fixture
async def world(tmp_path) -> AsyncIterator[World]:
    """A world whose builders end with the test."""
    made = World(tmp_path)
    yield made
    made.store.gate.set()
    for builds in made.started:
        await builds.drain(10)


async def ended(builds: Builds, name: str = "tiny") -> DeploymentView:
    """The last state of a deployment."""
    return [view async for view in builds.watch(name)][-1]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in a thread."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_a_cancelled_build_fails_and_leaves_what_is_served(world):
    """Over gRPC: CancelBuild answers at once, the build ends as BUILD_CANCELLED, and building again works."""
    builds = world.builder()
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: BuilderServicer(builds, Checks(builds._context)).register})
    async with AsyncClient(builder=await server.start()) as client:
        await client.build(world.deployment("one"))
        assert (await client.cancel("tiny")).state is DeploymentState.BUILDING
        world.store.gate.set()
        *_, last = [info async for info in client.watch("tiny")]
        assert (last.state, last.failure.reason) == (DeploymentState.FAILED, "BUILD_CANCELLED")
        assert (await client.cancel("tiny")).state is DeploymentState.FAILED
        assert current_generation(world.store, "tiny") is None
        assert list(world.store.list("builds/")) == []
        await client.build(world.deployment("one"))
        *_, last = [info async for info in client.watch("tiny")]
        assert (last.state, last.generation) == (DeploymentState.ACTIVE, 1)
        with pytest.raises(DeploymentNotFound):
            await client.cancel("other")
    await server.drain(5)


async def test_the_cancel_command(world):
    """`loramux cancel` waits for the end of the build and says it; without one it says what there is."""
    builds = world.builder()
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: BuilderServicer(builds, Checks(builds._context)).register})
    address = await server.start()
    await builds.build(world.deployment("one"))
    call = asyncio.create_task(
        asyncio.to_thread(CliRunner().invoke, app, ["cancel", "tiny", "--builder", address])
    )
    await asyncio.wait_for(builds._builds["tiny"].stopping.wait(), 20)
    world.store.gate.set()
    said = await call
    assert (said.exit_code, said.stdout.splitlines()[-1]) == (0, "tiny: failed, BUILD_CANCELLED")
    again = await asyncio.to_thread(CliRunner().invoke, app, ["cancel", "tiny", "--builder", address])
    assert (again.exit_code, again.stdout) == (0, "tiny: no build runs; it is failed\n")
    await server.drain(5)


async def test_a_waiting_build_can_be_cancelled(world):
    """A build that waits for its turn ends at once when it is cancelled, while the one before it goes on."""
    builds = world.builder(running=1)
    await builds.build(world.deployment("one", name="first"))
    await builds.build(world.deployment("two", name="second"))
    await builds.cancel("second")
    last = await asyncio.wait_for(ended(builds, "second"), 5)
    assert (last.state, last.failure.reason) == (State.FAILED, "BUILD_CANCELLED")
    assert (await builds.get("first")).state is State.BUILDING
    world.store.gate.set()
    assert (await ended(builds, "first")).state is State.ACTIVE
    assert (await builds.build(world.deployment("two", name="second"))).state is State.BUILDING
    assert (await ended(builds, "second")).state is State.ACTIVE


async def test_a_cancelled_build_stays_cancelled_after_a_kill(world):
    """A builder that is killed after a cancel does not run the build again."""
    entry = JournalEntry(deployment=world.deployment("one"), create_time=datetime.now(UTC), cancelled=True)
    Journal(world.store, OWNER).write(entry)
    builds = world.builder()
    assert await builds.recover() == 1
    assert (await ended(builds)).failure.reason == "BUILD_CANCELLED"
    assert list(world.store.objects) == []


async def test_a_failure_is_of_its_store(world):
    """A builder that starts where another one failed tells of that, unless it has another store."""
    first = world.builder()
    await first.build(world.deployment("bad"))
    assert (await ended(first)).state is State.FAILED
    await first.drain(10)
    for store, told in ((world.store, [State.FAILED]), (Gated(), [])):
        store.uri = store.uri if told else "memory://another"
        world.store = store
        builds = world.builder()
        await builds.recover()
        assert [view.state for view in (await builds.list(0, "")).views] == told
        await builds.drain(10)


async def test_a_build_that_takes_too_long_fails(world):
    """After its time a build fails with BUILD_TIMED_OUT and the limit; nothing of it is served."""
    builds = world.builder(timeout_s=0.3)
    await builds.build(world.deployment("one"))
    await asyncio.sleep(0.5)
    world.store.gate.set()
    last = await ended(builds)
    assert (last.state, last.failure.reason) == (State.FAILED, "BUILD_TIMED_OUT")
    assert "0.3 s" in last.failure.message
    assert current_generation(world.store, "tiny") is None


async def test_too_many_waiting_builds_are_refused(world):
    """One build more than may wait is QUEUE_FULL, and is not recorded."""
    builds = world.builder(running=1, waiting=1)
    for name in ("a", "b"):
        await builds.build(world.deployment("one", name=name))
    with pytest.raises(QueueFull, match="2 builds run or wait"):
        await builds.build(world.deployment("one", name="c"))
    assert len(list(world.store.list("builds/"))) == 2


async def test_a_failure_is_explained_after_a_restart(world):
    """What a build failed with is kept beside the work folder, not in the store, until a build succeeds."""
    builds = world.builder()
    await builds.build(world.deployment("bad"), "request-1")
    before = await ended(builds)
    assert world.store.objects == {}
    successor = world.builder()
    await successor.recover()
    after = await successor.get("tiny")
    assert (after.state, after.failure.reason) == (State.FAILED, "ADAPTER_INVALID")
    assert (after.failure.findings, after.create_time) == (before.failure.findings, before.create_time)
    assert [adapter.stage for adapter in after.adapters] == ["REFUSED"]
    assert (await successor.build(world.deployment("bad"), "request-1")).state is State.FAILED
    with pytest.raises(RequestIdReused):
        await successor.build(world.deployment("one"), "request-1")
    world.store.gate.set()
    await successor.build(world.deployment("one"))
    assert (await ended(successor)).state is State.ACTIVE
    third = world.builder()
    await third.recover()
    assert (await third.get("tiny")).state is State.ACTIVE


async def test_the_build_of_a_dead_builder_is_taken_over(world):
    """A build whose builder gives no sign of life goes on at another builder, under that one's name."""
    entry = JournalEntry(deployment=world.deployment("one"), create_time=datetime.now(UTC))
    Journal(world.store, OTHER).write(entry)
    builds = world.builder(beat_s=0.05, lease_s=0.2)
    assert await builds.recover() == 0
    await until(lambda: list(world.store.list("builds/")) == [f"builds/tiny/{OWNER}.json"])
    world.store.gate.set()
    assert (await ended(builds)).state is State.ACTIVE
    assert list(world.store.list("builds/")) == []


async def test_the_build_of_a_living_builder_is_left_alone(world):
    """While a builder gives signs of life its build is its own; nobody else runs it."""
    living = world.builder(OTHER, beat_s=0.05)
    await living.recover()
    await living.build(world.deployment("one"))
    builds = world.builder(beat_s=0.05, lease_s=0.5)
    await builds.recover()
    await asyncio.sleep(1.0)
    assert list(world.store.list("builds/")) == [f"builds/tiny/{OTHER}.json"]
    world.store.gate.set()
    assert (await ended(living)).state is State.ACTIVE


async def test_two_builders_build_one_deployment(world):
    """Different content under one name at two builders: both are published, and the later number is served."""
    one, two = world.builder(), world.builder(OTHER)
    await asyncio.gather(one.build(world.deployment("one")), two.build(world.deployment("two")))
    world.store.gate.set()
    ends = await asyncio.gather(ended(one), ended(two))
    assert [end.state for end in ends] == [State.ACTIVE, State.ACTIVE]
    assert len(list(world.store.list("deployments/tiny/generations/"))) == 2
    served = current_generation(world.store, "tiny")
    assert served is not None
    assert served.number == 2
    assert list(world.store.list("builds/")) == []


def test_an_entry_is_abandoned_when_it_does_not_change():
    """Only what was seen unchanged for a whole lease is abandoned; a change or an absence begins anew."""
    watch = Abandoned(10)
    assert watch.among({"a": b"1", "b": b"1"}, 0) == []
    assert watch.among({"a": b"1", "b": b"2"}, 9) == []
    assert watch.among({"a": b"1", "b": b"2"}, 10) == ["a"]
    assert watch.among({"b": b"2"}, 11) == []
    assert watch.among({"a": b"1", "b": b"2"}, 19) == ["b"]
    assert watch.among({"a": b"1"}, 28) == []
