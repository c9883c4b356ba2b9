"""Builds that end early: cancels, deadlines, restarts, other builders; and bundles that are damaged."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from builder_service.builds import journal
from builder_service.builds.journal import Journal, JournalEntry
from builder_service.builds.views import BuildState
from builder_service.pipeline.progress import AdapterProgress
from builder_service.pipeline.update import Update
from loramux.client import AsyncClient
from loramux.records import DeploymentState
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import BundleCorrupt, DeploymentNotFound, QueueFull, RequestIdReused
from loramux_shared.storage.base import Store, bound_of
from loramux_shared.storage.memory import MemoryStore
from tests.support import folders
from tests.support.adapters import write_adapter, write_base
from tests.support.builders import HOUR, OTHER, OWNER, Builders, Gated, ended, journaled
from tests.support.waiting import Clock, until


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Builders]:
    """A world whose gate is shut, and whose builders end with the test."""
    made = Builders(tmp_path)
    made.store.gate.clear()
    yield made
    await made.close()


async def test_a_cancelled_build_fails_and_leaves_what_is_served(world: Builders) -> None:
    """CancelBuild answers at once, the build ends as BUILD_CANCELLED, and a second build works."""
    async with world.served(world.builder()) as address, AsyncClient(builder=address) as client:
        await client.build(world.deployment("one"))
        assert (await client.cancel("tiny")).state is DeploymentState.BUILDING
        world.store.gate.set()
        *_, last = [info async for info in client.watch("tiny")]
        assert (last.state, last.failure.reason) == (DeploymentState.FAILED, "BUILD_CANCELLED")
        assert (await client.cancel("tiny")).state is DeploymentState.FAILED
        assert current_generation(world.store, "tiny") is None
        assert world.journal == []
        await client.build(world.deployment("one"))
        *_, last = [info async for info in client.watch("tiny")]
        assert (last.state, last.generation) == (DeploymentState.ACTIVE, 1)
        with pytest.raises(DeploymentNotFound):
            await client.cancel("other")


async def test_a_cancelled_build_stays_cancelled_after_a_kill(world: Builders) -> None:
    """A builder that is killed after a cancel does not run the build again."""
    entry = JournalEntry(deployment=world.deployment("one"), create_time=datetime.now(UTC), cancelled=True)
    journaled(world.store, OWNER, entry)
    builds = world.builder()
    assert await builds.recover() == 1
    last = await ended(builds)
    assert last.failure.reason == "BUILD_CANCELLED"
    assert list(world.store.objects) == []


async def test_a_failure_is_of_its_store(world: Builders) -> None:
    """A builder that starts where another one failed shows that failure, unless it has another store."""
    first = world.builder()
    await first.build(world.deployment("bad"))
    assert (await ended(first)).state is BuildState.FAILED
    for store, printed in ((world.store, [BuildState.FAILED]), (Gated(), [])):
        store.uri = store.uri if printed else "memory://another"
        world.store = store
        builds = world.builder()
        await builds.recover()
        assert [view.state for view in (await builds.list(0, "")).items] == printed


async def test_a_build_that_takes_too_long_fails(world: Builders) -> None:
    """A build that exceeds its time fails with BUILD_TIMED_OUT and the limit, and publishes nothing."""
    clock, builds = Clock(), world.builder(timeout_s=HOUR)
    await builds.build(world.deployment("one"))
    await until(world.store.waiting.is_set, "the build at the gate")
    clock.advance(HOUR)
    await asyncio.sleep(0.001)  # a timer of the loop that is due later than the limit
    world.store.gate.set()
    last = await ended(builds)
    assert (last.state, last.failure.reason) == (BuildState.FAILED, "BUILD_TIMED_OUT")
    assert "3600 s" in last.failure.message
    assert current_generation(world.store, "tiny") is None


async def test_too_many_waiting_builds_are_refused(world: Builders) -> None:
    """A build beyond the limit of waiting builds is refused with QUEUE_FULL, and is not recorded."""
    builds = world.builder(running=1, waiting=1)
    for name in ("a", "b"):
        await builds.build(world.deployment("one", name=name))
    with pytest.raises(QueueFull, match="2 builds run or wait"):
        await builds.build(world.deployment("one", name="c"))
    assert len(world.journal) == 2


async def test_a_failure_is_explained_after_a_restart(world: Builders) -> None:
    """A failed build is kept beside the work folder, not in the store, until a build succeeds."""
    builds = world.builder()
    await builds.build(world.deployment("bad"), "request-1")
    before = await ended(builds)
    assert before.failure.__traceback__ is None  # it would hold open what the build had open
    assert world.store.objects == {}
    successor = world.builder()
    await successor.recover()
    after = await successor.get("tiny")
    assert (after.state, after.failure.reason) == (BuildState.FAILED, "ADAPTER_INVALID")
    assert (after.failure.findings, after.create_time) == (before.failure.findings, before.create_time)
    assert [adapter.stage for adapter in after.adapters] == ["REFUSED"]
    assert (await successor.build(world.deployment("bad"), "request-1")).state is BuildState.FAILED
    with pytest.raises(RequestIdReused):
        await successor.build(world.deployment("one"), "request-1")
    world.store.gate.set()
    await successor.build(world.deployment("one"))
    assert (await ended(successor)).state is BuildState.ACTIVE
    third = world.builder()
    await third.recover()
    assert (await third.get("tiny")).state is BuildState.ACTIVE


class Beats:
    """The hours between two signs of life of the builders of a world: they pass when a test lets them."""

    def __init__(self, world: Builders, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.clock, self.asleep = world, Clock(), 0
        sleep = asyncio.sleep

        async def watched(seconds: float) -> None:
            self.asleep += seconds == HOUR
            try:
                await sleep(seconds)
            finally:
                self.asleep -= seconds == HOUR

        monkeypatch.setattr(asyncio, "sleep", watched)

    async def __call__(self, count: int) -> None:
        """Let every builder beat so often, and look at the journal."""
        builders = len(self.world.started)
        for looks in range(
            self.world.store.looks + builders, self.world.store.looks + count * builders + 1, builders
        ):
            await until(lambda: self.asleep == builders, "builders between two beats")
            self.clock.advance(HOUR)
            await until(
                lambda looks=looks: (self.asleep, self.world.store.looks) == (builders, looks), "a beat of each"
            )


@pytest.fixture
async def beats(world: Builders, monkeypatch: pytest.MonkeyPatch) -> Beats:
    return Beats(world, monkeypatch)


@pytest.mark.parametrize("updates", [False, True], ids=["a build", "an update"])
async def test_the_work_of_a_dead_builder_is_taken_over(world: Builders, beats: Beats, updates: bool) -> None:
    """A build without a heartbeat continues on another builder after a lease, under the same name."""
    wish = {"deployment": world.deployment("one")}
    if updates:
        world.store.gate.set()
        first = world.builder()
        await first.build(world.deployment("one"))
        await ended(first)
        world.started.clear()
        wish = {"update": Update(name="tiny", add={"two": world.repository("two")})}
        world.store.gate.clear()
    journaled(world.store, OTHER, JournalEntry(**wish, create_time=datetime.now(UTC)))
    builds = world.builder(beat_s=HOUR, lease_s=2 * HOUR, timeout_s=1e9)
    assert await builds.recover() == 0
    await beats(2)
    assert world.journal == [f"builds/tiny/{OTHER}.json"]
    await beats(1)
    await until(lambda: world.journal == [f"builds/tiny/{OWNER}.json"], "the take-over", lambda: world.journal)
    world.store.gate.set()
    assert (await ended(builds)).state is BuildState.ACTIVE
    assert (world.journal, list(world.generation.adapters)) == ([], ["one", "two"] if updates else ["one"])


async def test_the_build_of_a_living_builder_is_left_alone(world: Builders, beats: Beats) -> None:
    """A builder that gives signs of life keeps its build for longer than the lease of others."""
    living = world.builder(OTHER, beat_s=HOUR, timeout_s=1e9)
    await living.recover()
    await living.build(world.deployment("one"))
    await world.builder(beat_s=HOUR, lease_s=2 * HOUR).recover()
    await beats(5)
    [key] = world.journal
    assert (key, json.loads(world.store.get(key))["beat"]) == (f"builds/tiny/{OTHER}.json", 5)
    world.store.gate.set()
    assert (await ended(living)).state is BuildState.ACTIVE


def test_entries_beyond_their_bounds_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that is too large is removed; of entries that are too large together the first ones are read."""
    store = MemoryStore()
    key = f"builds/a/{OTHER}.json"
    store.objects[key] = bytes(bound_of(key) + 1)
    store.objects |= {f"builds/{name}/{OTHER}.json": bytes(10) for name in "bcd"}
    monkeypatch.setattr(journal, "JOURNAL_BYTES", 25)
    with capture_logs() as logs:
        assert list(Journal(store, OWNER).others()) == [f"builds/{name}/{OTHER}.json" for name in "bc"]
    assert key not in store.objects
    assert [line["event"].partition(",")[0] for line in logs] == [
        "journal entry is damaged",
        "journal entries exceed their size limit together",
    ]


def flip(data: bytes) -> bytes:
    """Flip one bit in the middle, as a faulty disk does."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (WEIGHTS_FILE, flip),
        (WEIGHTS_FILE, lambda _: None),
        (CONFIG_FILE, flip),
        (MANIFEST_FILE, flip),
        (MANIFEST_FILE, lambda _: b""),
    ],
)
def test_a_build_repairs_what_is_damaged(
    store: Store, tmp_path: Path, file: str, change: Callable[[bytes], bytes | None]
) -> None:
    """A damaged bundle is put again and reported as repaired, not as reused; then replicas can read it."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    context = folders.workshop(tmp_path, store)

    def built() -> AdapterProgress:
        deployment = folders.deployment_of(tmp_path, "one")
        return folders.built(deployment, context, verify=True).progress.adapters[0]

    digest = built().digest
    damaged = change(store.get(bundle_key(digest, file)))
    store.delete(bundle_key(digest, file))
    if damaged is not None:
        store.put(bundle_key(digest, file), damaged)
    with pytest.raises(BundleCorrupt):
        read_bundle(store, digest)
    again = built()
    assert (again.digest, again.reused, again.repaired) == (digest, False, True)
    read_bundle(store, digest)
    assert (built().reused, current_generation(store, "tiny").number) == (True, 1)
