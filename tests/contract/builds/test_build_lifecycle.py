"""Builds that end early: cancels, deadlines, restarts, other builders; and bundles that are damaged."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from builder_service.builds.builds import Builds
from builder_service.builds.journal import Journal, JournalEntry, Ticket
from builder_service.builds.keeper import BuildLimits, Keeper
from builder_service.builds.views import BuildState
from builder_service.pipeline.progress import AdapterProgress
from builder_service.pipeline.update import Update
from loramux.client import AsyncClient
from loramux.records import DeploymentState
from loramux_shared.access.keys import ACCESS, Access, Scope
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.generation import BUILDERS_PREFIX, BUILDS_PREFIX
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import (
    BundleCorrupt,
    DeploymentNotFound,
    QueueFull,
    RequestIdReused,
    StoreUnavailable,
)
from loramux_shared.storage.base import Store
from tests.support import folders
from tests.support.adapters import write_adapter, write_base
from tests.support.builders import HOUR, OTHER, OWNER, Builders, GatedStore, await_build, leave_builds
from tests.support.stores.killed import Killed
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
    leave_builds(world.store, OWNER, entry)
    builds = world.builder()
    assert await builds.recover() == 1
    last = await await_build(builds)
    assert last.failure.reason == "BUILD_CANCELLED"
    assert (world.journal, current_generation(world.store, "tiny")) == ([], None)


async def test_what_starts_that_died_left_is_one_change(world: Builders) -> None:
    """Each has put an entry, and one was cancelled: the change is taken up once, and one entry stays.

    Until it was taken up, its old entries keep back the changes behind it.
    """
    entry = JournalEntry(deployment=world.deployment("one"), request_id="r", create_time=datetime.now(UTC))
    taken: list[tuple[int, bool, int]] = []

    async def start(*, dies: bool) -> int:
        async def take_up(_: Ticket, entry: JournalEntry) -> None:
            if dies:
                raise Killed
            taken.append((entry.attempt, entry.cancelled, len(world.journal)))

        limits = BuildLimits()
        return await Keeper(world.store, Journal(world.store, OWNER, HOUR), limits, take_up).recover()

    leave_builds(world.store, OWNER, entry)
    for _ in range(3):
        with pytest.raises(Killed):
            await start(dies=True)
    leave_builds(world.store, OWNER, entry.model_copy(update={"cancelled": True}))
    assert len(world.journal) == 5
    assert await start(dies=False) == 1
    assert taken == [(5, True, 6)]
    assert len(world.journal) == 1


async def test_a_failure_is_of_its_store(world: Builders) -> None:
    """A builder that starts where another one failed shows that failure, unless it has another store."""
    first = world.builder()
    await first.build(world.deployment("bad"))
    assert (await await_build(first)).state is BuildState.FAILED
    for store, printed in ((world.store, [BuildState.FAILED]), (GatedStore(), [])):
        store.uri = store.uri if printed else "memory://another"
        world.store = store
        builds = world.builder()
        await builds.recover()
        assert [view.state for view in (await builds.list(0, "")).items] == printed


async def test_what_another_builder_publishes_comes_after_a_failure(world: Builders) -> None:
    """A builder whose build failed shows the generation that another one made of the deployment since."""
    first, other = world.builder(), world.builder(OTHER)
    world.store.gate.set()
    await first.build(world.deployment("bad"))
    assert (await await_build(first)).state is BuildState.FAILED
    await other.build(world.deployment("one"))
    assert (await await_build(other)).state is BuildState.ACTIVE
    assert (await first.get("tiny")).state is BuildState.ACTIVE


async def test_a_build_that_takes_too_long_fails(world: Builders) -> None:
    """A build that exceeds its time fails with BUILD_TIMED_OUT and the limit, and publishes nothing."""
    clock, builds = Clock(), world.builder(timeout_s=HOUR)
    await builds.build(world.deployment("one"))
    await until(world.store.waiting.is_set, "the build at the gate")
    clock.advance(HOUR)
    await asyncio.sleep(0.001)  # a timer of the loop that is due later than the limit
    world.store.gate.set()
    last = await await_build(builds)
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


@pytest.mark.parametrize(("keys", "last"), [("aaaa", "b"), ("abab", "c"), ("abab", "")])
async def test_one_key_does_not_fill_the_queue(world: Builders, keys: str, last: str) -> None:
    """A key that is alone has all places but one, of two busy keys each has half, and the next has the last."""
    builds = world.builder(running=1, waiting=4)

    async def build(key_id: str) -> None:
        ACCESS.set(Access(key_id, frozenset({Scope.BUILD})))
        await builds.build(world.deployment("one", name=f"x{len(world.journal)}"))

    for key_id in keys:
        await build(key_id)
    for key_id in set(keys):
        share = f"{keys.count(key_id)} builds of this key run or wait, which is its share of 5"
        with pytest.raises(QueueFull, match=share):
            await build(key_id)
    await build(last)
    with pytest.raises(QueueFull, match="5 builds run or wait"):
        await build("d")
    assert len(world.journal) == 5


async def test_a_failure_is_explained_after_a_restart(world: Builders) -> None:
    """A failed build is kept beside the work folder, not in the store, until a build succeeds."""
    builds = world.builder()
    await builds.build(world.deployment("bad"), "request-1")
    before = await await_build(builds)
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
    assert (await await_build(successor)).state is BuildState.ACTIVE
    third = world.builder()
    await third.recover()
    assert (await third.get("tiny")).state is BuildState.ACTIVE


async def killed(world: Builders, *entries: JournalEntry) -> Builds:
    """Leave changes of another builder that was killed; return a builder that saw it alive once."""
    leave_builds(world.store, OTHER, *entries)
    builds = world.builder(beat_s=HOUR, lease_s=2 * HOUR, timeout_s=1e9)
    assert await builds.recover() == 0
    await builds.keeper.look_once()
    return builds


def runs(world: Builders) -> list[str]:
    """Return the owners of the changes that have not ended."""
    return [ticket.run.partition(".")[0] for key in world.journal if (ticket := Ticket.parse(key))]


@pytest.mark.parametrize("updates", [False, True], ids=["a build", "an update"])
async def test_the_work_of_a_dead_builder_is_taken_over(world: Builders, updates: bool) -> None:
    """A change of a builder without a heartbeat continues on another one after a lease, and not before."""
    clock, wish = Clock(), {"deployment": world.deployment("one")}
    if updates:
        world.store.gate.set()
        first = world.builder()
        await first.build(world.deployment("one"))
        await await_build(first)
        wish = {"update": Update(name="tiny", add={"two": world.repository("two")})}
        world.store.gate.clear()
    builds = await killed(world, JournalEntry(**wish, create_time=datetime.now(UTC)))
    clock.advance(HOUR)
    await builds.keeper.look_once()
    assert runs(world) == [OTHER]
    clock.advance(HOUR)
    await builds.keeper.look_once()
    assert runs(world) == [OWNER]
    world.store.gate.set()
    assert (await await_build(builds)).state is BuildState.ACTIVE
    assert (world.journal, list(world.generation.adapters)) == ([], ["one", "two"] if updates else ["one"])


async def test_the_build_of_a_living_builder_is_left_alone(world: Builders) -> None:
    """A builder that gives signs of life keeps its build for longer than the lease of others."""
    clock, living = Clock(), world.builder(OTHER, beat_s=HOUR, lease_s=2 * HOUR, timeout_s=1e9)
    await living.recover()
    await living.build(world.deployment("one"))
    other = world.builder(beat_s=HOUR, lease_s=2 * HOUR)
    await other.recover()
    for _ in range(5):
        beats = {key: world.store.get(key) for key in world.store.list(BUILDERS_PREFIX) if OTHER in key}
        clock.advance(HOUR)
        await until(lambda beats=beats: any(world.store.get(key) != beats[key] for key in beats), "a heartbeat")
        await other.keeper.look_once()
    assert runs(world) == [OTHER]
    world.store.gate.set()
    assert (await await_build(living)).state is BuildState.ACTIVE


async def test_a_change_that_cannot_be_read_stays_and_blocks_nothing(world: Builders) -> None:
    """An entry of another release, or a damaged one, is neither removed nor waited for."""
    world.store.gate.set()
    builds = await killed(
        world, JournalEntry(deployment=world.deployment("two"), create_time=datetime.now(UTC))
    )
    [key] = world.journal
    world.store.objects[key] = b'{"of": "a later release"}'
    clock = Clock()
    clock.advance(2 * HOUR)
    await builds.keeper.look_once()
    await builds.build(world.deployment("one"))
    assert (await await_build(builds)).state is BuildState.ACTIVE
    assert world.journal == [key]


async def test_a_change_waits_for_an_earlier_one_of_another_builder(world: Builders) -> None:
    """Two builders with changes of one deployment publish them in the order in which they were accepted."""
    world.store.gate.set()
    one, other = world.builder(), world.builder(OTHER)
    for builds in (one, other):
        await builds.recover()
    await one.build(world.deployment("one"))
    await await_build(one)
    world.store.gate.clear()
    await one.update(Update(name="tiny", add={"x": world.repository("two")}), "first")
    await until(world.store.waiting.is_set, "the first change at the gate")
    await other.update(Update(name="tiny", add={"x": world.repository("three")}), "second")
    assert world.generation.number == 1
    world.store.gate.set()
    views = [view async for view in other.watch("tiny", request_id="second")]
    assert (views[-1].state, views[-1].generation) == (BuildState.ACTIVE, 3)
    assert world.generation.adapters["x"].source.repo.endswith("three")


async def test_a_change_that_was_published_is_not_applied_again(world: Builders) -> None:
    """A journal entry whose change is in a generation ends without another one, whatever came after it."""
    world.store.gate.set()
    first = world.builder()
    await first.recover()
    await first.build(world.deployment("one"))
    await await_build(first)
    entry = JournalEntry(
        update=Update(name="tiny", add={"x": world.repository("two")}),
        request_id="r",
        create_time=datetime.now(UTC),
    )
    leave_builds(world.store, OTHER, entry)
    left = dict(world.store.objects)
    for number, owner in ((2, OTHER), (4, "2" * 16)):
        again = world.builder(owner)
        if number == 4:
            await first.rollback("tiny", 1, None)
            key = next(key for key in left if key.startswith(BUILDS_PREFIX))
            world.store.objects[key.replace(OTHER, owner)] = left[key]
        assert await again.recover() == 1
        assert (await await_build(again)).state is BuildState.ACTIVE
        assert (world.generation.number, "x" in world.generation.adapters) == (
            (2, True) if number == 2 else (3, False)
        )


class Faulty(GatedStore):
    """Raises a fault once: in the next put, or in the next removal of a change's entry."""

    def __init__(self) -> None:
        super().__init__()
        self.put_fault: Exception | None = None
        self.delete_fault: Exception | None = None

    def put(self, key: str, data: bytes | Path) -> None:
        fault, self.put_fault = self.put_fault, None
        if fault is not None:
            raise fault
        super().put(key, data)

    def delete(self, key: str) -> None:
        fault = self.delete_fault if key.startswith(BUILDS_PREFIX) else None
        if fault is not None:
            self.delete_fault = None
            raise fault
        super().delete(key)


async def test_a_removal_that_fails_is_repeated_before_the_end_is_reported(world: Builders) -> None:
    """A build whose entry cannot be removed is reported only after that: no later start runs it again."""
    world.store = store = Faulty()
    builds = world.builder()
    await builds.recover()
    store.delete_fault = StoreUnavailable("the store is down")
    await builds.build(world.deployment("one"))
    assert (await await_build(builds)).state is BuildState.ACTIVE
    assert (store.delete_fault, world.journal) == (None, [])


async def test_a_heartbeat_that_raises_begins_again(world: Builders) -> None:
    """A builder whose heartbeat meets a defect gives signs of life again: nobody takes its builds."""
    world.store = store = Faulty()
    builds, clock = world.builder(beat_s=HOUR), Clock()
    await builds.recover()
    await asyncio.sleep(0)  # the heartbeat waits now
    [key] = store.list(BUILDERS_PREFIX)
    before, store.put_fault = store.get(key), TypeError("a defect")
    clock.advance(HOUR)
    await until(lambda: store.put_fault is None, "the defect")

    def comes_later() -> bool:
        clock.advance(HOUR)
        return store.get(key) != before

    await until(comes_later, "the next heartbeat")


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
    context = folders.context_of(tmp_path, store)

    def built() -> AdapterProgress:
        deployment = folders.deployment_of(tmp_path, "one")
        return folders.run_build(deployment, context, verify=True).progress.adapters[0]

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
