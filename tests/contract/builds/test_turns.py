"""Changes of one deployment that come at the same moment: each gets its turn, and those that wait share one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from builder_service.builds.builds import Builds
from builder_service.builds.views import BuildState, DeploymentView
from builder_service.pipeline.update import Update
from loramux_shared.faults import BuildCancelled, BuildInProgress
from tests.support.adapters import tensors, write_adapter
from tests.support.builders import Builders, await_build
from tests.support.waiting import bounded

MANY = 12


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Builders]:
    """A deployment of one adapter, and many that can come in."""
    made = Builders(tmp_path)
    for seed in range(MANY):
        write_adapter(tmp_path / f"m{seed}", tensors(seed=20 + seed))
    yield made
    await made.close()


async def started(world: Builders) -> Builds:
    """A builder whose deployment is generation 1."""
    builds = world.builder()
    await builds.build(world.deployment("one"))
    await await_build(builds)
    return builds


def wish(world: Builders, *names: str, **fields: Any) -> Update:
    return Update(name="tiny", add={name: world.repository(name) for name in names}, **fields)


async def end_of(builds: Builds, request_id: str) -> DeploymentView:
    async with bounded(f"the end of {request_id}"):
        return [view async for view in builds.watch("tiny", request_id=request_id)][-1]


async def ask(builds: Builds, world: Builders, *requests: tuple[str, Update]) -> None:
    """Have the first change wait in the middle of its work, and the others behind it."""
    (first, update), *others = requests
    world.store.gate.clear()
    await builds.update(update, first)
    async with bounded("the work of the first change"):
        await asyncio.to_thread(world.store.waiting.wait)
    await asyncio.gather(*(builds.update(update, request_id) for request_id, update in others))


def reason(view: DeploymentView) -> str:
    """Why a build failed; empty where it did not."""
    return view.failure.reason if view.failure else ""


async def test_what_cannot_be_published_fails_alone(world: Builders) -> None:
    """Bad adapters, names that are taken and generations that passed: the others of the turn are served."""
    builds = await started(world)
    changes = {
        "first": (wish(world, "m0"), ""),
        "good": (wish(world, "m1", must_be_new=True), ""),
        "bad": (wish(world, "bad", must_be_new=True), "ADAPTER_INVALID"),
        "twice": (wish(world, "m1", must_be_new=True), "ADAPTER_EXISTS"),
        "gone": (Update(name="tiny", remove=("nine",)), "ADAPTER_NOT_FOUND"),
        "expects": (wish(world, "m2", expected_generation=1), "GENERATION_MISMATCH"),
        "last": (wish(world, "m3"), ""),
    }
    await ask(builds, world, *((name, update) for name, (update, _) in changes.items()))
    world.store.gate.set()
    for name, (_, expected) in changes.items():
        assert reason(await end_of(builds, name)) == expected, name
    assert set(world.generation.adapters) == {"one", "m0", "m1", "m3"}


async def test_a_change_follows_what_was_accepted_before_it(world: Builders) -> None:
    """Changes of one adapter are in order; and behind a build, which in turn waits for nothing."""
    builds = await started(world)
    remove = Update(name="tiny", remove=("m1",))
    changes = wish(world, "m0"), wish(world, "m1"), remove, wish(world, "m2")
    await ask(builds, world, *zip("0123", changes, strict=True))
    with pytest.raises(BuildInProgress):
        await builds.build(world.deployment("two"))
    world.store.gate.set()
    assert [(await end_of(builds, number)).state for number in "0123"] == [BuildState.ACTIVE] * 4
    assert set(world.generation.adapters) == {"one", "m0", "m2"}
    world.store.gate.clear()
    await builds.build(world.deployment("two"))
    await builds.update(wish(world, "m3"), "behind")
    world.store.gate.set()
    assert (await end_of(builds, "behind")).state is BuildState.ACTIVE
    assert {"two", "m3"} <= set(world.generation.adapters)


async def test_a_cancel_ends_all_that_run_or_wait(world: Builders) -> None:
    """A cancel ends all running and waiting builds, and publishes nothing."""
    builds = await started(world)
    await ask(builds, world, *((f"m{seed}", wish(world, f"m{seed}")) for seed in range(4)))
    await builds.cancel("tiny")
    world.store.gate.set()
    for seed in range(4):
        assert reason(await end_of(builds, f"m{seed}")) == BuildCancelled.reason
    assert (world.generation.number, world.journal) == (1, [])
