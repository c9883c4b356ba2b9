"""kill -9 at every step of a build, as far as one process can show it, and the next start."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from builder_service.builds.builds import Builds
from builder_service.builds.keeper import BuildLimits
from builder_service.builds.views import BuildState
from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import current_generation, read_generation
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.deployment import Deployment
from loramux_shared.faults import Fault
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.examples import spread
from tests.support.folders import context_of, deployment_of, run_build
from tests.support.stores.killed import DyingStore, Killed, copy_store
from tests.support.waiting import BOUND_S

NAMES = ("one", "two", "three")


class World:
    """A store that serves an old generation, and a deployment that becomes the new one."""

    def __init__(self, folder: Path) -> None:
        write_base(folder / "base")
        for i, name in enumerate(NAMES):
            write_adapter(folder / name, tensors(seed=i % 2))  # the third is the first
        self.folder, self.start = folder, MemoryStore()
        self.new = deployment_of(folder, *NAMES)
        run_build(deployment_of(folder, "one"), self.context(self.start))

    def context(self, store: MemoryStore | DyingStore) -> BuildContext:
        """A workshop over a store."""
        return context_of(self.folder, store)

    async def life(
        self, store: MemoryStore | DyingStore, required: Deployment | None = None
    ) -> BuildState | None:
        """Start a builder, let it resume builds, ask for a build, and wait for the end of both."""
        builds = Builds(self.context(store), BuildLimits(running=2, beat_s=1000))
        state = None
        with suppress(Fault, Killed):
            await builds.recover()
            if required is not None:
                await builds.build(required)
            async for view in builds.watch("tiny"):
                state = view.state
        with suppress(Killed):
            await builds.drain(BOUND_S)
        return state

    def check_reader(self, store: MemoryStore) -> Generation:
        """Check that a reader sees the old generation or the new one, and every bundle of each whole."""
        for number in generation_numbers(store, "tiny"):
            for record in read_generation(store, "tiny", number).adapters.values():
                read_bundle(store, record.digest)
        found = current_generation(store, "tiny")
        assert found is not None
        assert set(found.adapters) in ({"one"}, {"one", "two", "three"})
        return found

    def check_end(self, store: MemoryStore) -> None:
        """The new generation is served, and nothing waits to be taken up."""
        assert set(self.check_reader(store).adapters) == {"one", "two", "three"}
        assert list(store.list("builds/")) == []
        assert list((self.folder / "work").iterdir()) == []


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world of small adapters, whose many deaths are not printed."""
    with structlog.testing.capture_logs():
        yield World(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.sweep), True])
async def test_a_kill_at_every_operation_of_the_store(world: World, after: bool) -> None:
    """Readers see old or new after a kill at any operation, and the next start ends the build."""
    whole = DyingStore(copy_store(world.start))
    assert await world.life(whole, world.new) is BuildState.ACTIVE
    assert whole.count > 25
    accepted = 0
    for dies_at in range(1, whole.count + 1):
        store = copy_store(world.start)
        await world.life(DyingStore(store, dies_at, after=after), world.new)
        world.check_reader(store)
        store = copy_store(store)  # a while later: claims of the dead builder are stale
        if journalled := list(store.list("builds/")):
            accepted += 1
            assert await world.life(store) is BuildState.ACTIVE, dies_at
        else:  # not accepted yet, or ended already: the client asks again
            assert await world.life(store, world.new) is BuildState.ACTIVE, dies_at
        world.check_end(store)
        assert accepted or not journalled
    assert accepted > whole.count // 2


def test_a_kill_at_changes_in_the_work_folder(world: World) -> None:
    """A kill at any end of fetching, validating and converting publishes nothing, and a rebuild works."""
    seen = [0, 0]  # changes, and the one that kills

    def change() -> None:
        seen[0] += 1
        if seen[0] >= seen[1] > 0:
            raise Killed

    build(
        world.new, replace(world.context(copy_store(world.start)), parallel_adapters=2), Progress(NAMES, change)
    )
    events = seen[0]
    assert events > 40
    for seen[1] in spread(range(1, events + 1), 12):
        store, seen[0] = copy_store(world.start), 0
        with suppress(Killed):
            build(world.new, world.context(store), Progress(NAMES, change))
        world.check_reader(store)
        run_build(world.new, world.context(store))
        world.check_end(store)
