"""A model of the builders' queue: clients, two or three builders, a store that fails, deaths and standstills.

Each change gives one of three names an adapter that no other change gives it, or brings a name that must be
new, so that the generations tell which changes were applied, how often and in which order.
"""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from builder_service.builds import journal
from builder_service.builds.builds import Builds
from builder_service.builds.keeper import BuildLimits
from builder_service.builds.running import Failures, RunningBuild, place_of
from builder_service.builds.views import BuildState
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.update import Update
from loramux_shared.bundle import claims, deployments
from loramux_shared.bundle.deployments import current_generation, newest_or_none, publish_generation
from loramux_shared.bundle.generation import BUILDS_PREFIX
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import Fault, ShuttingDown
from loramux_shared.storage import patient
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from tests.property.builds.simulation import Host, HostStore, Simulation, TimedStore
from tests.support.builders import Builders
from tests.support.examples import examples
from tests.support.folders import run_build
from tests.support.stores.killed import Killed

HISTORIES = examples(40)
NAMES = ("a", "b", "c")
VERSIONS = 24
LIMITS = BuildLimits(timeout_s=1e9)


@dataclass
class Change:
    """A change as its client sees it."""

    name: str
    version: str
    call_time: float
    accepted: float | None = None
    reported: list[str] = field(default_factory=list)
    """Ends that the client saw."""
    ends: set[str] = field(default_factory=set)
    """Ends at any builder."""


@dataclass
class Life:
    """A builder until it dies."""

    owner: str
    host: Host
    builds: Builds


class History:
    """One drawn history."""

    def __init__(self, seed: int, start: MemoryStore, base: BuildContext, folder: Path) -> None:
        self.loop = Simulation(seed)
        self.draw, self.store = self.loop.draw, TimedStore(self.loop.time)
        self.store.objects.update(start.objects)
        self.base, self.folder, self.uri = base, folder, f"memory://{seed}"
        self.lives: dict[str, Life] = {}
        self.changes: list[Change] = []
        self.published: list[tuple[int, dict[str, str]]] = []
        self.places: set[Path | None] = set()
        """Where builders keep failures."""
        self.failed: set[str] = set()
        """Requests whose failures were kept."""
        self.tasks: list[asyncio.Task[None]] = []
        self.strange: set[BaseException] = set()
        """Failures of watches that no client should see."""

    def look(self) -> None:
        """Note the newest generation, which others build on, and the failures that builders will tell.

        A generation that is overtaken is never served.
        """
        newest = newest_or_none(self.store, "tiny")
        assert newest is not None
        state = {name: record.source.repo for name, record in newest.adapters.items() if name[0] != "v"}
        if not self.published or self.published[-1][0] < newest.number:
            self.published.append((newest.number, state))
        for place in self.places:
            for failed in Failures(place).all():
                self.failed.add(failed.entry.request_id)

    async def begin(self, owner: str) -> None:
        """Start a builder, again and again where the store does not answer."""
        while True:
            host = Host()
            store: Store = HostStore(self.loop, host, self.store, self.uri)
            context = BuildContext(store, self.base.sources, self.folder, owner=owner, bases=self.base.bases)
            builds = Builds(context, LIMITS)
            self.places.add(place_of(context))
            builds.watchers.append(partial(self.note, host))
            try:
                await builds.recover()
            except Fault:
                host.dead = True
                with suppress(Killed):
                    await builds.drain(0)
                await asyncio.sleep(1)
            else:
                self.lives[owner] = Life(owner, host, builds)
                return

    def note(self, host: Host, running: RunningBuild) -> None:
        """Note the end of a change at a builder that lives."""
        if not host.dead and running.refusal is None and running.state is not BuildState.BUILDING:
            change = self.changes[int(running.entry.request_id[1:])]
            change.ends.add(running.state if running.failure is None else running.failure.reason)

    def kill(self, owner: str) -> None:
        self.lives.pop(owner).host.dead = True

    async def ask(self, version: int) -> None:
        """Be a client: ask a builder for a change, and follow it to its end."""
        name = self.draw.choice((*NAMES, f"new-{version}"))
        change = Change(name, f"v{version}", self.loop.time())
        self.changes.append(change)
        life, request_id = self.lives[self.draw.choice(sorted(self.lives))], f"r{version}"
        source = Repository(source=SourceKind.PUSHED, repo=change.version)
        wish = Update(name="tiny", add={name: source}, must_be_new=name not in NAMES)
        try:
            await life.builds.update(wish, request_id)
            if life.host.dead:
                return
            change.accepted = self.loop.time()
            async for view in life.builds.watch("tiny", request_id=request_id):
                state = view.state
        except (Fault, Killed) as error:
            self.strange |= (
                {error} if change.accepted and not isinstance(error, ShuttingDown | Killed) else set()
            )
            return
        if not life.host.dead:
            assert state is not BuildState.BUILDING
            change.reported.append(state)

    async def live(self) -> None:
        """Let clients ask while builders die and stand still and the store fails; then let all end."""
        owners = [str(number) * 16 for number in range(self.draw.choice((2, 2, 3)))]
        for owner in owners:
            await self.begin(owner)
        self.loop.faults = self.draw.choice((0.0, 0.1, 0.4))
        for version in range(self.draw.randint(2, 8)):
            self.tasks.append(asyncio.create_task(self.ask(version)))
            await asyncio.sleep(self.draw.choice((0, 0.1, 1, 20)))
            await self.disturb(owners)
        self.loop.faults = 0.0
        for owner in owners:
            if owner not in self.lives and (self.draw.random() < 0.7 or not self.lives):
                await self.begin(owner)
        for _ in range(40):
            if not list(self.store.list(BUILDS_PREFIX)):
                break
            await asyncio.sleep(30)
        await asyncio.sleep(120)  # a builder that stood still writes what it was about to
        await asyncio.gather(*self.tasks)
        for life in self.lives.values():
            await life.builds.drain(1)

    async def disturb(self, owners: list[str]) -> None:
        """Let a builder die, stand still, or begin again."""
        event = self.draw.random()
        if event < 0.2 and len(self.lives) > 1:
            self.kill(self.draw.choice(sorted(self.lives)))
        elif event < 0.4:
            life = self.lives[self.draw.choice(sorted(self.lives))]
            life.host.still_until = self.loop.time() + self.draw.choice((20, 100, 200))
        elif event < 0.6:
            for owner in owners:
                if owner not in self.lives:
                    await self.begin(owner)

    def check(self) -> None:
        """Nothing accepted was lost, nothing was applied twice or in another order, no client was misled."""
        assert list(self.store.list(BUILDS_PREFIX)) == []
        assert not self.strange
        served = current_generation(self.store, "tiny")
        assert served is not None
        assert served.number == self.published[-1][0]
        for place in self.places:
            for failed in Failures(place).all():
                is_told = failed.update_time > served.create_time
                assert not (
                    is_told and self.changes[int(failed.entry.request_id[1:])].ends == {BuildState.ACTIVE}
                )
        applied: dict[str, list[int]] = {}
        for (_, before), (number, after) in zip(
            [(0, dict[str, str]()), *self.published], self.published, strict=False
        ):
            for name in after:
                if before.get(name) != after[name]:
                    applied.setdefault(after[name], []).append(number)
        for change in self.changes:
            numbers = applied.get(change.version, [])
            assert change.ends <= ({BuildState.ACTIVE} if numbers else {"STORE_UNAVAILABLE"}), (change, numbers)
            if change.accepted is not None:
                expected = [BuildState.FAILED] if not numbers else [BuildState.ACTIVE]
                assert change.reported in ([], expected), (change, numbers)
            assert len(numbers) <= 1, (change, numbers)
        self.check_order()

    def check_order(self) -> None:
        """The newest accepted change of a name is what is served, unless other calls were under way."""
        _, state = self.published[-1]
        for name in NAMES:
            of_name = [change for change in self.changes if change.name == name]
            accepted = [c for c in of_name if c.accepted is not None and f"r{c.version[1:]}" not in self.failed]
            for change in accepted:
                behind = [
                    c
                    for c in of_name
                    if c is not change and (c.accepted is None or c.accepted > change.call_time)
                ]
                allowed = {change.version, *(c.version for c in behind)}
                assert state.get(name) in allowed, (name, state, of_name)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, BuildContext]:
    """A deployment with an adapter for each change that can come, all with one bundle."""
    world = Builders(tmp_path_factory.mktemp("journal"))
    context = world.context()
    generation = run_build(world.deployment("one"), context).generation
    record = generation.adapters["one"]
    pool = {
        f"v{number}": record.model_copy(
            update={"source": Repository(source=SourceKind.PUSHED, repo=f"v{number}"), "added": True}
        )
        for number in range(VERSIONS)
    }
    publish_generation(world.store, generation.model_copy(update={"adapters": pool}))
    return world.store, context


@pytest.fixture
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("first", range(0, HISTORIES, 20))
def test_nothing_accepted_is_lost_or_applied_twice(
    first: int, start: tuple[MemoryStore, BuildContext], monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """Every history ends with an empty queue, and with each accepted change applied once and in order."""
    for seed in range(first, first + 20):
        with tempfile.TemporaryDirectory() as folder:
            history = History(seed, *start, Path(folder))
            clock = SimpleNamespace(sleep=history.loop.sleep, monotonic=history.loop.monotonic)
            for module in (claims, patient):
                monkeypatch.setattr(module, "time", clock)
            monkeypatch.setattr(claims, "random", history.loop)
            for module in (claims, journal, deployments):
                monkeypatch.setattr(module, "secrets", history.loop)
            history.loop.after_step = history.look
            try:
                history.loop.run_until_complete(history.live())
                history.look()
                history.check()
            except BaseException as error:
                error.add_note(f"history {seed}")
                raise
            finally:
                history.loop.close()
