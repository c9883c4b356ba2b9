from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from builder_service.builds.builds import MAX_ATTEMPTS, Builds
from builder_service.builds.journal import Journal, JournalEntry
from builder_service.builds.limits import BuildLimits
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from loramux.builder.v1 import builder_pb2 as pb
from loramux.builder.v1 import builder_pb2_grpc
from loramux.mapping import Watched, deployment_of
from loramux.messages import deployment_to_message
from loramux_shared.bundle.generation import current_key
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import Fault, StoreUnavailable
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.status import fault_of
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base

State, Stage = pb.Deployment, pb.AdapterBuild


class GatedStore(MemoryStore):
    """Puts of bundles wait until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.down = False

    def put(self, key: str, data: bytes | Path) -> None:
        """Store when the gate is open."""
        if self.down:
            raise StoreUnavailable("the store is down")
        if key.startswith("bundles/"):
            assert self.gate.wait(20)
        super().put(key, data)


class Running:
    """A served builder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = GatedStore()
        self.context = BuildContext(self.store, open_sources(local_roots=[folder]), folder / "work")
        self.builds = Builds(self.context, BuildLimits(running=2))
        self.stub: Any = None

    def deployment(self, *adapters: str, name: str = "tiny", **lora: Any) -> Deployment:
        """A deployment of adapters below the folder."""
        local = {adapter: {"source": "LOCAL", "repo": str(self.folder / adapter)} for adapter in adapters}
        base = {"source": "LOCAL", "repo": str(self.folder / "base")}
        build = {"checkpoint_repository": base, "lora_adapters": local, "lora_configuration": lora}
        return parse_deployment({"model_name": name, "build": build}).deployment

    async def build(self, deployment: Deployment, request_id: str = "") -> pb.Deployment:
        """Call BuildDeployment."""
        request = pb.BuildDeploymentRequest(deployment=deployment_to_message(deployment), request_id=request_id)
        return (await self.stub.BuildDeployment(request)).deployment

    async def watch(self, name: str = "tiny") -> list[pb.Deployment]:
        """Every state until the end."""
        return [
            item.deployment async for item in self.stub.WatchDeployment(pb.WatchDeploymentRequest(name=name))
        ]

    async def get(self, name: str = "tiny") -> pb.Deployment:
        """Call GetDeployment."""
        return (await self.stub.GetDeployment(pb.GetDeploymentRequest(name=name))).deployment


@pytest.fixture
async def running(tmp_path) -> AsyncIterator[Running]:
    """A builder behind a real channel, and a small base and two adapters beside it."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "two", tensors(("o_proj",), rank=8), r=8, target_modules=["o_proj"])
    made = Running(tmp_path)
    server = RpcServer(
        "127.0.0.1:0", {SERVICE_NAME: BuilderServicer(made.builds, Checks(made.context)).register}
    )
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        made.stub = builder_pb2_grpc.BuilderServiceStub(channel)
        yield made
    made.store.gate.set()
    await made.builds.drain(5)
    await server.drain(5)


async def failure(call: Any) -> Fault:
    """The fault that a call fails with."""
    with pytest.raises(grpc.RpcError) as error:
        await call
    return fault_of(error.value)


async def test_a_build_is_answered_at_once_and_watched_to_its_end(running):
    """BuildDeployment answers BUILDING while nothing is published; the watch ends with ACTIVE and all facts."""
    running.store.gate.clear()
    answer = await running.build(running.deployment("one", "two"))
    assert (answer.state, answer.generation) == (State.STATE_BUILDING, 0)
    watching = asyncio.create_task(running.watch())
    await asyncio.sleep(0.2)
    running.store.gate.set()
    states = await watching
    assert states[0].state == State.STATE_BUILDING
    last = states[-1]
    assert (last.state, last.generation, last.unchanged) == (State.STATE_ACTIVE, 1, False)
    one, two = last.adapters
    assert (one.name, one.stage, list(one.ranks), list(one.modules)) == (
        "one",
        Stage.STAGE_DONE,
        [4],
        ["attn_q", "attn_v"],
    )
    assert (one.tensors_used, two.tensors_used, len(one.digest)) == (8, 4, 64)
    assert one.bytes_done == one.bytes_total == one.bundle_bytes > 0
    assert one.warnings[0].code == "W_BASE"
    assert last == await running.get()


async def test_the_same_content_is_unchanged(running):
    """A second build of the same content is ACTIVE with unchanged, the same generation and kept adapters."""
    await running.build(running.deployment("one"))
    await running.watch()
    before = dict(running.store.objects)
    await running.build(running.deployment("one"))
    last = (await running.watch())[-1]
    assert (last.state, last.unchanged, last.generation) == (State.STATE_ACTIVE, True, 1)
    assert (last.adapters[0].kept, last.adapters[0].reused) == (True, False)
    assert running.store.objects == before


async def test_calls_join_the_same_build(running):
    """The same content and the same request_id lead to the build that runs; another content has to wait."""
    running.store.gate.clear()
    request_id = str(uuid.uuid4())
    first = await running.build(running.deployment("one"), request_id)
    assert (await running.build(running.deployment("one"))).create_time == first.create_time
    assert (await running.build(running.deployment("one"), request_id)).create_time == first.create_time
    other = running.deployment("two")
    assert (await failure(running.build(other))).reason == "BUILD_IN_PROGRESS"
    assert (await failure(running.build(other, request_id))).reason == "REQUEST_ID_REUSED"
    running.store.gate.set()
    await running.watch()
    again = await running.build(running.deployment("one"), request_id)
    assert (again.state, again.create_time) == (State.STATE_ACTIVE, first.create_time)


async def test_a_refused_build_says_everything_and_leaves_nothing(running):
    """A failed build is FAILED with its reason and every finding; the store stays empty."""
    write_adapter(running.folder / "bad", use_dora=True, task_type="SEQ_CLS")
    await running.build(running.deployment("bad", "two", max_lora_rank=4))
    last = (await running.watch())[-1]
    assert (last.state, last.failure.reason, last.generation) == (State.STATE_FAILED, "ADAPTER_INVALID", 0)
    found = [(finding.adapter, finding.code) for finding in last.failure.findings]
    assert found == [("bad", "E_TASK"), ("bad", "E_DORA"), ("two", "E_RANK_MAX")]
    assert [adapter.stage for adapter in last.adapters] == [Stage.STAGE_REFUSED] * 2
    assert running.store.objects == {}
    assert await running.get() == last


async def test_a_failed_build_keeps_the_served_generation(running):
    """After a failed build the older generation is still the one that is served."""
    await running.build(running.deployment("one"))
    await running.watch()
    await running.build(running.deployment("nowhere"))
    last = (await running.watch())[-1]
    assert (last.state, last.failure.reason, last.generation) == (State.STATE_FAILED, "REPO_NOT_FOUND", 1)


async def test_bad_messages_are_refused_with_their_fields(running):
    """A message that breaks a rule is DEPLOYMENT_INVALID with the fields, and starts nothing."""
    fault = await failure(running.build(running.deployment("one", lora_target_modules=["q_proj"])))
    assert (fault.reason, fault.findings[0].where) == (
        "DEPLOYMENT_INVALID",
        "build.lora_configuration.lora_target_modules",
    )
    assert "attn_q" in fault.findings[0].fix
    assert (
        await failure(running.stub.BuildDeployment(pb.BuildDeploymentRequest()))
    ).reason == "DEPLOYMENT_INVALID"
    assert running.store.objects == {}


async def test_unknown_deployments(running):
    """Get and Watch of an unknown name are DEPLOYMENT_NOT_FOUND and list what there is."""
    await running.build(running.deployment("one"))
    await running.watch()
    for name in ("other", "", "../tiny", "x" * 5000):
        assert (await failure(running.get(name))).reason == "DEPLOYMENT_NOT_FOUND"
    assert "there are tiny" in (await failure(running.watch("other"))).message


async def test_lists_have_pages(running):
    """Pages follow each other by name, the last one has no token, and a foreign token is refused."""
    for name in ("c", "a", "b"):
        await running.build(running.deployment(name=name))
        await running.watch(name)
    first = await running.stub.ListDeployments(pb.ListDeploymentsRequest(page_size=2))
    assert [item.name for item in first.deployments] == ["a", "b"]
    rest = await running.stub.ListDeployments(pb.ListDeploymentsRequest(page_token=first.next_page_token))
    assert ([item.name for item in rest.deployments], rest.next_page_token) == (["c"], "")
    for token in ("?", "AAA", "////", "Li4="):
        call = running.stub.ListDeployments(pb.ListDeploymentsRequest(page_token=token))
        assert (await failure(call)).reason == "PAGE_TOKEN_INVALID"


async def test_a_store_that_is_down_refuses_the_build(running):
    """A build that cannot be recorded is STORE_UNAVAILABLE, and the same call works later."""
    running.store.down = True
    request_id = str(uuid.uuid4())
    fault = await failure(running.build(running.deployment("one"), request_id))
    assert fault.reason == "STORE_UNAVAILABLE"
    running.store.down = False
    assert (await running.build(running.deployment("one"), request_id)).state == State.STATE_BUILDING
    assert (await running.watch())[-1].state == State.STATE_ACTIVE


async def test_a_restarted_builder_knows_the_store(running):
    """State of an earlier process is read from the store; damage shows as FAILED and not as an error."""
    await running.build(running.deployment("one"))
    before = (await running.watch())[-1]
    successor = Builds(running.context, BuildLimits(running=1))
    view = await successor.get("tiny")
    assert (view.state, view.generation, view.adapters[0].digest) == ("ACTIVE", 1, before.adapters[0].digest)
    assert [finding.code for finding in view.adapters[0].warnings] == ["W_BASE"]
    running.store.objects[current_key("tiny")] = b"{}"
    view = await successor.get("tiny")
    assert (view.state, view.failure.reason) == ("FAILED", "BUNDLE_CORRUPT")


async def test_drain_interrupts_and_the_successor_goes_on(running):
    """Watchers of an interrupted build get SHUTTING_DOWN; its journal entry makes the successor run it."""
    running.store.gate.clear()
    await running.build(running.deployment("one", "two"))
    watching = asyncio.create_task(failure(running.watch()))
    await asyncio.sleep(0.3)
    draining = asyncio.create_task(running.builds.drain(0.1))
    await asyncio.sleep(0.3)
    running.store.gate.set()
    await draining
    assert (await watching).reason == "SHUTTING_DOWN"
    assert (await failure(running.build(running.deployment("one")))).reason == "SHUTTING_DOWN"
    assert "builds/tiny/builder.json" in running.store.objects
    successor = Builds(running.context, BuildLimits(running=1))
    assert await successor.recover() == 1
    states = [view.state async for view in successor.watch("tiny")]
    assert states[-1] == "ACTIVE"
    assert "builds/tiny/builder.json" not in running.store.objects


async def test_a_build_that_kills_the_builder_is_given_up(running):
    """A journalled build that outlived several starts fails, and is not tried for ever."""
    entry = JournalEntry(
        deployment=running.deployment("one"), create_time=datetime.now(UTC), attempt=MAX_ATTEMPTS
    )
    Journal(running.store, "builder").write(entry)
    running.store.objects["builds/broken/builder.json"] = b"?"
    assert await running.builds.recover() == 1
    last = (await running.watch())[-1]
    assert (last.state, last.failure.reason) == (State.STATE_FAILED, "INTERNAL")
    assert running.store.objects == {}


async def test_a_watcher_gets_few_and_late_states(running):
    """A burst of changes is merged: a watcher gets about twenty states a second, and always the last."""
    running.store.gate.clear()
    await running.build(running.deployment("one"))
    build = running.builds._builds["tiny"]
    seen = []

    async def collect() -> None:
        async for view in build.views():
            seen.append(view)  # noqa: PERF401 - read while it grows

    collecting = asyncio.create_task(collect())
    await asyncio.sleep(0.3)
    before = len(seen)

    def burst() -> None:
        for _ in range(2000):
            build.progress.advance("one", 0)

    await asyncio.to_thread(burst)
    await asyncio.sleep(0.3)
    assert len(seen) - before <= 8
    running.store.gate.set()
    await collecting
    assert seen[-1].state == "ACTIVE"


async def test_a_watcher_can_ask_for_changes_only(running: Running) -> None:
    """With changes_only a state holds the adapters that changed; the client makes whole states of them."""
    names = [f"small-{number}" for number in range(20)]
    for number, name in enumerate(names):
        write_adapter(running.folder / name, tensors(seed=number))
    await running.build(running.deployment(*names))
    request = pb.WatchDeploymentRequest(name="tiny", changes_only=True)
    watched, sent = Watched(), 0
    async for message in running.stub.WatchDeployment(request):
        sent += len(message.deployment.adapters)
        state = watched.state_of(message)
        assert [adapter.name for adapter in state.adapters] == sorted(names)
    assert state == deployment_of(await running.get())
    changes_of_one = 3 * len(Stage.Stage.keys())  # it enters a stage, counts bytes there, and is described
    assert sent <= len(names) * changes_of_one
    again = [message async for message in running.stub.WatchDeployment(request)]
    assert [len(message.deployment.adapters) for message in again] == [len(names)]
