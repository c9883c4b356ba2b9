"""The builder's service over gRPC, as its messages say it: builds, watches, lists and refusals."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from builder_service.builds import running
from builder_service.builds.journal import JournalEntry
from builder_service.builds.running import RunningBuild
from builder_service.builds.turns import MAX_ATTEMPTS
from loramux.builder.v1 import builder_pb2 as pb, builder_pb2_grpc
from loramux.mapping import Watched, deployment_of
from loramux.messages import deployment_to_message
from loramux_shared.bundle.generation import current_key
from loramux_shared.deployment import Deployment
from loramux_shared.faults import BuildCancelled, Fault
from loramux_shared.rpc.status import fault_of
from tests.support.adapters import tensors, write_adapter
from tests.support.builders import HOUR, OWNER, Builders, await_build, leave_builds
from tests.support.waiting import Clock, result_of, until

State, Stage = pb.Deployment, pb.AdapterBuild


class Served(Builders):
    """A served builder, and its stub."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_adapter(folder / "wide", tensors(("o_proj",), rank=8), r=8, target_modules=["o_proj"])
        self.builds = self.builder()
        self.stub: Any = None

    async def build(self, deployment: Deployment, request_id: str = "") -> pb.Deployment:
        request = pb.BuildDeploymentRequest(deployment=deployment_to_message(deployment), request_id=request_id)
        return (await self.stub.BuildDeployment(request)).deployment

    async def watch(self, name: str = "tiny") -> list[pb.Deployment]:
        """Every state until the end."""
        calls = self.stub.WatchDeployment(pb.WatchDeploymentRequest(name=name))
        return [item.deployment async for item in calls]

    async def get(self, name: str = "tiny") -> pb.Deployment:
        return (await self.stub.GetDeployment(pb.GetDeploymentRequest(name=name))).deployment


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Served]:
    """A builder behind a real channel, with an open gate."""
    made = Served(tmp_path)
    async with made.served(made.builds) as address, grpc.aio.insecure_channel(address) as channel:
        made.stub = builder_pb2_grpc.BuilderServiceStub(channel)
        yield made


async def failure(call: Any) -> Fault:
    with pytest.raises(grpc.RpcError) as error:
        await call
    return fault_of(error.value)


async def test_a_build_is_answered_at_once_and_watched_to_its_end(world: Served) -> None:
    """BuildDeployment answers BUILDING while nothing is published; the watch ends with ACTIVE and all facts."""
    world.store.gate.clear()
    answer = await world.build(world.deployment("one", "wide"))
    assert (answer.state, answer.generation) == (State.STATE_BUILDING, 0)
    states = []
    async for item in world.stub.WatchDeployment(pb.WatchDeploymentRequest(name="tiny")):
        states.append(item.deployment)
        world.store.gate.set()
    assert states[0].state == State.STATE_BUILDING
    last = states[-1]
    assert (last.state, last.generation, last.unchanged) == (State.STATE_ACTIVE, 1, False)
    one, wide = last.adapters
    assert (one.name, one.stage) == ("one", Stage.STAGE_DONE)
    assert (list(one.ranks), list(one.modules)) == ([4], ["attn_q", "attn_v"])
    assert (one.tensors_used, wide.tensors_used, len(one.digest)) == (8, 4, 64)
    assert one.bytes_done == one.bytes_total == one.bundle_bytes > 0
    assert one.warnings[0].code == "W_BASE"
    assert last == await world.get()


async def test_calls_join_the_same_build(world: Served) -> None:
    """The same content and the same request_id lead to the build that runs; another content has to wait."""
    world.store.gate.clear()
    request_id = str(uuid.uuid4())
    first = await world.build(world.deployment("one"), request_id)
    assert (await world.build(world.deployment("one"))).create_time == first.create_time
    assert (await world.build(world.deployment("one"), request_id)).create_time == first.create_time
    other = world.deployment("wide")
    assert (await failure(world.build(other))).reason == "BUILD_IN_PROGRESS"
    assert (await failure(world.build(other, request_id))).reason == "REQUEST_ID_REUSED"
    assert (await failure(world.build(other, "9" * 129))).reason == "REQUEST_INVALID"
    world.store.gate.set()
    await world.watch()
    again = await world.build(world.deployment("one"), request_id)
    assert (again.state, again.create_time) == (State.STATE_ACTIVE, first.create_time)


async def test_a_refused_build_says_everything_and_leaves_nothing(world: Served) -> None:
    """A failed build is FAILED with its reason and every finding; the store stays empty."""
    write_adapter(world.folder / "bad", use_dora=True, task_type="SEQ_CLS")
    await world.build(world.deployment("bad", "wide", lora_configuration={"max_lora_rank": 4}))
    last = (await world.watch())[-1]
    assert (last.state, last.failure.reason, last.generation) == (State.STATE_FAILED, "ADAPTER_INVALID", 0)
    found = [(finding.adapter, finding.code) for finding in last.failure.findings]
    assert found == [("bad", "E_TASK"), ("bad", "E_DORA"), ("wide", "E_RANK_MAX")]
    assert [adapter.stage for adapter in last.adapters] == [Stage.STAGE_REFUSED] * 2
    assert world.store.objects == {}
    assert list((world.folder / "work").glob("loramux-build-*")) == []
    assert await world.get() == last


async def test_bad_messages_are_refused_with_their_fields(world: Served) -> None:
    """A message that breaks a rule is DEPLOYMENT_INVALID with the fields, and starts nothing."""
    fault = await failure(
        world.build(world.deployment("one", lora_configuration={"lora_target_modules": ["q_proj"]}))
    )
    assert fault.reason == "DEPLOYMENT_INVALID"
    assert fault.findings[0].where == "build.lora_configuration.lora_target_modules"
    assert "attn_q" in fault.findings[0].fix
    assert (
        await failure(world.stub.BuildDeployment(pb.BuildDeploymentRequest()))
    ).reason == "DEPLOYMENT_INVALID"
    assert world.store.objects == {}


async def test_lists_have_pages(world: Served) -> None:
    """Pages follow each other by name, the last one has no token, and a foreign token is refused."""
    for name in ("c", "a", "b"):
        await world.build(world.deployment(name=name))
        await world.watch(name)
    first = await world.stub.ListDeployments(pb.ListDeploymentsRequest(page_size=2))
    assert [item.name for item in first.deployments] == ["a", "b"]
    rest = await world.stub.ListDeployments(pb.ListDeploymentsRequest(page_token=first.next_page_token))
    assert ([item.name for item in rest.deployments], rest.next_page_token) == (["c"], "")
    for token in ("?", "AAA", "////", "Li4="):
        call = world.stub.ListDeployments(pb.ListDeploymentsRequest(page_token=token))
        assert (await failure(call)).reason == "PAGE_TOKEN_INVALID"


async def test_a_store_that_is_down_refuses_the_build(world: Served) -> None:
    """A build that cannot be recorded is STORE_UNAVAILABLE, and the same call works later."""
    world.store.down = True
    request_id = str(uuid.uuid4())
    fault = await failure(world.build(world.deployment("one"), request_id))
    assert fault.reason == "STORE_UNAVAILABLE"
    world.store.down = False
    assert (await world.build(world.deployment("one"), request_id)).state == State.STATE_BUILDING
    assert (await world.watch())[-1].state == State.STATE_ACTIVE


async def test_a_restarted_builder_knows_the_store(world: Served) -> None:
    """State of an earlier process is read from the store; damage shows as FAILED and not as an error."""
    await world.build(world.deployment("one"))
    before = (await world.watch())[-1]
    successor = world.builder()
    view = await successor.get("tiny")
    assert (view.state, view.generation, view.adapters[0].digest) == ("ACTIVE", 1, before.adapters[0].digest)
    assert [finding.code for finding in view.adapters[0].warnings] == ["W_BASE"]
    world.store.objects[current_key("tiny")] = b"{}"
    view = await successor.get("tiny")
    assert (view.state, view.failure.reason) == ("FAILED", "BUNDLE_CORRUPT")


async def test_drain_interrupts_and_the_successor_goes_on(world: Served) -> None:
    """Watchers of an interrupted build get SHUTTING_DOWN; its journal entry makes the successor run it."""
    world.store.gate.clear()
    await world.build(world.deployment("one", "wide"))
    stopping = world.stopping(world.builds)
    watching = world.stub.WatchDeployment(pb.WatchDeploymentRequest(name="tiny"))
    assert (await anext(aiter(watching))).deployment.state == State.STATE_BUILDING
    clock, draining = Clock(), asyncio.create_task(world.builds.drain(HOUR))
    await asyncio.sleep(0)
    assert (await failure(world.build(world.deployment("one")))).reason == "SHUTTING_DOWN"
    assert not stopping.is_set()
    clock.advance(HOUR)
    await result_of(stopping.wait(), "the end of the time to drain")
    world.store.gate.set()
    await draining
    with pytest.raises(grpc.RpcError) as error:
        [item async for item in watching]
    assert fault_of(error.value).reason == "SHUTTING_DOWN"
    assert [key.startswith("builds/tiny/") for key in world.journal] == [True]
    successor = world.builder()
    assert await successor.recover() == 1
    assert (await await_build(successor)).state == "ACTIVE"
    assert world.journal == []


async def test_a_build_that_kills_the_builder_is_given_up(world: Served) -> None:
    """A journalled build that outlived several starts fails, and is not tried for ever."""
    entry = JournalEntry(
        deployment=world.deployment("one"), create_time=datetime.now(UTC), attempt=MAX_ATTEMPTS
    )
    leave_builds(world.store, OWNER, entry)
    assert await world.builds.recover() == 1
    last = (await world.watch())[-1]
    assert (last.state, last.failure.reason) == (State.STATE_FAILED, "INTERNAL")
    assert world.journal == []


async def test_a_watcher_gets_few_and_late_states(world: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of changes is one state, which comes after the interval; the last state always comes."""
    monkeypatch.setattr(running, "WATCH_INTERVAL_S", HOUR)
    clock = Clock()
    build = RunningBuild(JournalEntry(deployment=world.deployment("one"), create_time=datetime.now(UTC)))
    seen: list[int] = []

    async def collect() -> str:
        async for view in build.views():
            seen.append(view.adapters[0].bytes_done)
        return view.state

    collecting = asyncio.create_task(collect())
    await until(lambda: seen, "the first state")
    await asyncio.to_thread(lambda: [build.progress.advance("one", 1) for _ in range(2000)])
    await asyncio.sleep(0.001)
    assert seen == [0]
    clock.advance(HOUR)
    await until(lambda: len(seen) == 2, "the state after the burst")
    build.fail(BuildCancelled("enough"))
    await asyncio.sleep(0.001)
    assert seen == [0, 2000]
    clock.advance(HOUR)
    assert await collecting == "FAILED"
    assert seen == [0, 2000, 2000]


async def test_a_watcher_can_ask_for_changes_only(world: Served) -> None:
    """A state holds the adapters that changed, with changes_only; the client makes whole states of them."""
    names = [f"small-{number}" for number in range(20)]
    for number, name in enumerate(names):
        write_adapter(world.folder / name, tensors(seed=number))
    await world.build(world.deployment(*names))
    request = pb.WatchDeploymentRequest(name="tiny", changes_only=True)
    watched, sent = Watched(), 0
    async for message in world.stub.WatchDeployment(request):
        sent += len(message.deployment.adapters)
        state = watched.state_of(message)
        assert [adapter.name for adapter in state.adapters] == sorted(names)
    assert state == deployment_of(await world.get())
    changes_of_one = 3 * len(Stage.Stage.keys())  # it enters a stage, counts bytes there, and is described
    assert sent <= len(names) * changes_of_one
    again = [message async for message in world.stub.WatchDeployment(request)]
    assert [len(message.deployment.adapters) for message in again] == [len(names)]
