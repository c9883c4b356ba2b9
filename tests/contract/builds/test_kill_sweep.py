"""kill -9 at every step of a build, as far as one process can show it, and what the next start makes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import structlog

from builder_service.builds.builds import Builds
from builder_service.builds.limits import BuildLimits
from builder_service.builds.views import State
from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import current_generation, read_generation
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import Fault
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Entry
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base

T = TypeVar("T")


class Killed(BaseException):
    """The end of the process."""


class Mortal:
    """A store whose user dies at its n-th operation: before it took effect, or after, without an answer."""

    def __init__(self, store: MemoryStore, dies_at: int = 0, *, after: bool = False) -> None:
        self.store, self.uri = store, store.uri
        self.dies_at, self.after = dies_at, after
        self.count = 0
        self.lock = threading.Lock()

    @property
    def dead(self) -> bool:
        """Whether nothing it does has an effect any more."""
        return 0 < self.dies_at <= self.count

    def _lives(self, operation: Callable[[], T]) -> T:
        with self.lock:
            if self.dead:
                raise Killed
            self.count += 1
            if self.dead and not self.after:
                raise Killed
            result = operation()
            if self.dead:
                raise Killed
            return result

    def get(self, key: str) -> bytes:
        """Read, if alive."""
        return self._lives(lambda: self.store.get(key))

    def put(self, key: str, data: bytes | Path) -> None:
        """Write, if alive."""
        self._lives(lambda: self.store.put(key, data))

    def take(self, key: str, file: Path) -> None:
        """Move, if alive."""
        self._lives(lambda: self.store.take(key, file))

    def sha256(self, key: str) -> str | None:
        """Look, if alive."""
        return self._lives(lambda: self.store.sha256(key))

    def list(self, prefix: str) -> Iterator[str]:
        """List, if alive."""
        return iter(self._lives(lambda: [*self.store.list(prefix)]))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """List, if alive."""
        return iter(self._lives(lambda: [*self.store.entries(prefix)]))

    def delete(self, key: str) -> None:
        """Remove, if alive."""
        self._lives(lambda: self.store.delete(key))


class World:
    """A store that serves an old generation, and a deployment that becomes the new one."""

    def __init__(self, folder: Path) -> None:
        write_base(folder / "base")
        for i, name in enumerate(("one", "two", "three")):
            write_adapter(folder / name, tensors(seed=i % 2))  # the third is the first
        self.folder = folder
        self.old = self.deployment("one")
        self.new = self.deployment("one", "two", "three")
        self.start = MemoryStore()
        build(self.old, self.context(self.start), Progress(["one"]))

    def deployment(self, *names: str) -> Deployment:
        """A deployment of adapters below the folder."""
        local = {name: {"source": "LOCAL", "repo": str(self.folder / name)} for name in names}
        base = {"source": "LOCAL", "repo": str(self.folder / "base")}
        data = {"model_name": "tiny", "build": {"checkpoint_repository": base, "lora_adapters": local}}
        return parse_deployment(data).deployment

    def context(self, store: MemoryStore | Mortal) -> BuildContext:
        """A workshop over a store."""
        return BuildContext(store, open_sources(local_roots=[self.folder]), self.folder / "work")

    def copy(self) -> MemoryStore:
        """The store at the beginning."""
        store = MemoryStore()
        store.objects.update(self.start.objects)
        return store

    async def life(self, store: MemoryStore | Mortal, wanted: Deployment | None = None) -> State | None:
        """Start a builder, let it take up what there is, ask for a build, and wait for the end of both."""
        builds = Builds(self.context(store), BuildLimits(running=2, beat_s=1000))
        state = None
        with suppress(Fault, Killed):
            await builds.recover()
            if wanted is not None:
                await builds.build(wanted)
            async for view in builds.watch("tiny"):
                state = view.state
        await builds.drain(10)
        return state

    def check_reader(self, store: MemoryStore) -> Generation:
        """Whoever reads sees the old generation or the new one, and every bundle of every generation whole."""
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
def world(tmp_path):
    """A world of small adapters, whose many deaths are not printed."""
    with structlog.testing.capture_logs():
        yield World(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.sweep), True])
async def test_a_kill_at_every_operation_of_the_store(world, after):
    """Whatever operation is the last, readers see old or new, and the next start ends the build."""
    whole = Mortal(world.copy())
    assert await world.life(whole, world.new) is State.ACTIVE
    assert whole.count > 25
    accepted = 0
    for dies_at in range(1, whole.count + 1):
        store = world.copy()
        await world.life(Mortal(store, dies_at, after=after), world.new)
        world.check_reader(store)
        if journalled := list(store.list("builds/")):
            accepted += 1
            assert await world.life(store) is State.ACTIVE, dies_at
        else:  # not accepted yet, or ended already: whoever asked asks again
            assert await world.life(store, world.new) is State.ACTIVE, dies_at
        world.check_end(store)
        assert accepted or not journalled
    assert accepted > whole.count // 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_second_kill_at_every_operation_of_the_recovery(world):
    """A builder that is killed while it takes a build up leaves it to its next start."""
    begun = world.copy()
    await world.life(Mortal(begun, 20), world.new)
    assert list(begun.list("builds/"))
    recovery = Mortal(replace_objects(begun))
    assert await world.life(recovery) is State.ACTIVE
    for dies_at in range(1, recovery.count + 1):
        store = replace_objects(begun)
        await world.life(Mortal(store, dies_at), None)
        world.check_reader(store)
        await world.life(store, world.new)
        world.check_end(store)


def test_a_kill_at_every_change_in_the_work_folder(world):
    """Wherever fetching, validating and converting end, nothing is half published and a rebuild works."""
    events = 0

    def count() -> None:
        nonlocal events
        events += 1

    build(
        world.new,
        replace(world.context(world.copy()), parallel_adapters=2),
        Progress(["one", "two", "three"], count),
    )
    assert events > 40
    for dies_at in range(1, events + 1):
        store, seen = world.copy(), 0

        def die(dies_at: int = dies_at) -> None:
            nonlocal seen
            seen += 1
            if seen >= dies_at:
                raise Killed

        with suppress(Killed):
            build(world.new, world.context(store), Progress(["one", "two", "three"], die))
        world.check_reader(store)
        build(world.new, world.context(store), Progress(["one", "two", "three"]))
        world.check_end(store)


def replace_objects(store: MemoryStore) -> MemoryStore:
    """A copy of a store."""
    copied = MemoryStore()
    copied.objects.update(store.objects)
    return copied
