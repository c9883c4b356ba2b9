"""Following a deployment: newer generations are taken over whole, once, and never backwards."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from inference_service.serving.adapters.follower import Follower, State
from inference_service.serving.adapters.restart import needs_restart
from loramux_shared.bundle.deployments import publish_generation, read_generation
from loramux_shared.bundle.generation import (
    AdapterRecord,
    BaseRecord,
    Current,
    Generation,
    current_key,
    generation_key,
)
from loramux_shared.bundle.manifest import FileDigest, sha256_hex
from loramux_shared.deployment import Dtype, Merge, Repository, SourceKind
from loramux_shared.faults import ReplicaBehind, ResourcesExhausted, Status
from loramux_shared.rpc.status import status_of
from tests.support.bundles import Unsteady

FAST_S = 0.02


def record(name, digest=None):
    """An adapter of a generation."""
    source = Repository(source=SourceKind.HF, repo=f"org/{name}", revision="main")
    return AdapterRecord(digest=digest or sha256_hex(name.encode()), source=source)


def generation(*names, **fields):
    """A generation of adapters; its number is given when it is published."""
    base = BaseRecord(
        source=Repository(source=SourceKind.HF, repo="org/base", revision="1"),
        files={"model.safetensors": FileDigest(size=1, sha256="b" * 64)},
    )
    values = {
        "deployment": "d",
        "number": 1,
        "create_time": datetime.now(UTC),
        "served_model_name": "base",
        "base": base,
        "adapters": {name: record(name) for name in names},
        "max_lora_rank": 16,
        "lora_dtype": Dtype.BFLOAT16,
    }
    return Generation(**(values | fields))


@pytest.fixture
def store():
    """A store whose deployment has one generation."""
    store = Unsteady()
    publish_generation(store, generation("one"))
    store.asked.clear()
    return store


class Replica:
    """Whoever takes generations over."""

    def __init__(self, store, **options):
        self.took = []
        self.stale = []
        self.fails = 0
        options = {"interval_s": FAST_S, "spacing_s": 0.0, "on_stale": self.stale.append} | options
        self.follower = Follower(store, read_generation(store, "d", 1), self.take, **options)
        self.task = None

    def take(self, new):
        """Take a generation over, or fail as often as was asked for."""
        if self.fails:
            self.fails -= 1
            raise ResourcesExhausted("no room")
        self.took.append(new)

    @property
    def numbers(self):
        """Of the generations that were taken over."""
        return [new.number for new in self.took]

    async def __aenter__(self):
        self.task = asyncio.create_task(self.follower.run())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.follower.close()


async def until(condition, timeout_s=10.0):
    """Wait until something is so."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_newer_generation_is_taken_over_once(store):
    """It is taken over with its content, and looks after it read the pointer alone."""
    async with Replica(store) as replica:
        second = publish_generation(store, generation("one", "two"))
        await until(lambda: replica.took)
        store.asked.clear()
        await asyncio.sleep(5 * FAST_S)
        assert replica.took == [second]
        assert replica.follower.standing.generation == 2
        assert replica.follower.standing.state is State.CURRENT
        assert set(store.asked) == {current_key("d")}


async def test_generations_between_two_looks_are_passed_over(store):
    """Only the newest is taken over."""
    for names in (("a",), ("b",), ("c",)):
        publish_generation(store, generation(*names))
    async with Replica(store) as replica:
        await until(lambda: replica.took)
        assert replica.numbers == [4]


@pytest.mark.parametrize(
    "damage", ["pointer", "generation", "half pointer", "missing generation", "no pointer"]
)
async def test_what_is_damaged_is_never_applied_and_tried_again(store, damage):
    """A damaged or half-written record is said once, the replica serves on, and repair is enough."""
    publish_generation(store, generation("one", "two"))
    pointer, newer = store.objects[current_key("d")], store.objects[generation_key("d", 2)]
    if damage == "pointer":
        store.objects[current_key("d")] = pointer.replace(b'"generation":2', b'"generation":02')
    elif damage == "half pointer":
        store.objects[current_key("d")] = pointer[: len(pointer) // 2]
    elif damage == "no pointer":
        del store.objects[current_key("d")]
    elif damage == "generation":
        store.objects[generation_key("d", 2)] = newer.replace(b"two", b"owt")
    else:
        del store.objects[generation_key("d", 2)]
    with capture_logs() as logs:
        async with Replica(store) as replica:
            await until(lambda: replica.follower.standing.blind)
            await asyncio.sleep(20 * FAST_S)
            assert replica.took == []
            assert replica.follower.standing.state is State.BLIND
            store.objects[current_key("d")], store.objects[generation_key("d", 2)] = pointer, newer
            await until(lambda: replica.took)
            assert replica.numbers == [2]
            assert replica.follower.standing.blind == ""
    said = [line["event"] for line in logs if line["log_level"] == "warning"]
    assert len(said) == 1


async def test_a_store_that_is_away_is_logged_once_and_when_it_is_back(store):
    """Between the two lines the replica serves what it has."""
    with capture_logs() as logs:
        async with Replica(store) as replica:
            store.away = True
            await until(lambda: replica.follower.standing.blind)
            await asyncio.sleep(5 * FAST_S)
            assert replica.follower.standing.generation == 1
            store.away = False
            await until(lambda: replica.follower.standing.state is State.CURRENT)
    events = [line["event"] for line in logs]
    assert len(events) == 2
    assert "serves what it has" in events[0]
    assert "seen again" in events[1]


async def test_a_lower_number_is_never_taken_over(store):
    """A pointer that goes back, as a restored copy of a store has it, is logged once and not followed."""
    old = store.objects[current_key("d")]
    publish_generation(store, generation("one", "two"))
    with capture_logs() as logs:
        async with Replica(store) as replica:
            await until(lambda: replica.took)
            store.objects[current_key("d")] = old
            await asyncio.sleep(10 * FAST_S)
            assert replica.numbers == [2]
            assert replica.follower.standing.generation == 2
    assert len([line for line in logs if "older generation" in line["event"]]) == 1


async def test_what_needs_a_restart_is_said_and_not_half_taken(store):
    """The replica serves what it has, says why, tells who wants to end it once, and takes a later one."""
    with capture_logs() as logs:
        async with Replica(store) as replica:
            publish_generation(store, generation("one", "two", max_seq_len=64))
            await until(lambda: replica.stale)
            await asyncio.sleep(5 * FAST_S)
            standing = replica.follower.standing
            assert (standing.generation, standing.newest, standing.state) == (1, 2, State.STALE)
            assert "another max_seq_len: 64 instead of none" in standing.stale
            assert len(replica.stale) == 1
            with pytest.raises(ReplicaBehind, match="a restart"):
                await replica.follower.catch_up(2)
            publish_generation(store, generation("three"))
            await until(lambda: replica.took)
            assert replica.numbers == [3]
            assert replica.follower.standing.state is State.CURRENT
    assert len([line for line in logs if line["event"] == "a generation needs a restart"]) == 1


async def test_a_generation_that_cannot_be_taken_is_tried_again(store):
    """What fails while names are switched is stale with its reason until a later try succeeds."""
    async with Replica(store) as replica:
        replica.fails = 3
        publish_generation(store, generation("one", "two"))
        await until(lambda: replica.follower.standing.stale == "no room")
        await until(lambda: replica.took)
        assert replica.numbers == [2]
        assert replica.follower.standing.stale == ""


async def test_catching_up_reads_ones_own_writes(store):
    """A request that names a generation which was just published finds it, long before the next look."""
    async with Replica(store, interval_s=3600.0) as replica:
        published = publish_generation(store, generation("one", "two"))
        await replica.follower.catch_up(published.number)
        assert replica.numbers == [2]
        asked = len(store.asked)
        await replica.follower.catch_up(1)
        await replica.follower.catch_up(2)
        assert len(store.asked) == asked


async def test_several_who_catch_up_share_a_look(store):
    """Fifty requests for what does not exist cost two looks, and all are REPLICA_BEHIND."""
    store.latency_s = 0.05
    async with Replica(store, interval_s=3600.0) as replica:
        found = await asyncio.gather(*(replica.follower.catch_up(9) for _ in range(50)), return_exceptions=True)
        assert {type(fault) for fault in found} == {ReplicaBehind}
        assert store.asked.count(current_key("d")) == 2


async def test_who_joins_a_look_that_began_too_early_gets_another(store):
    """What was published after a look began is found by the caller who came meanwhile."""
    store.latency_s = 0.1
    async with Replica(store, interval_s=3600.0) as replica:
        first = asyncio.create_task(replica.follower.catch_up(9))
        await asyncio.sleep(0.05)
        pointer = store.objects[current_key("d")]
        published = publish_generation(store, generation("one", "two"))
        assert store.objects[current_key("d")] != pointer
        await replica.follower.catch_up(published.number)
        assert replica.follower.standing.generation == 2
        with pytest.raises(ReplicaBehind):
            await first


async def test_a_look_that_is_just_over_is_not_taken_for_one_under_way(store):
    """Who comes between the end of a look and the moment in which it is forgotten looks anew."""
    async with Replica(store, interval_s=3600.0) as replica:
        over = asyncio.create_task(asyncio.sleep(0))
        await over
        replica.follower._looking = over
        published = publish_generation(store, generation("one", "two"))
        await replica.follower.catch_up(published.number)
        assert replica.follower.standing.generation == 2


async def test_looks_that_requests_ask_for_are_spaced(store):
    """A client that asks for the impossible in a loop does not make the replica ask the store in a loop."""
    async with Replica(store, interval_s=3600.0, spacing_s=0.1) as replica:
        store.asked.clear()
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.55
        while loop.time() < end:
            with pytest.raises(ReplicaBehind):
                await replica.follower.catch_up(5)
        assert 2 <= len(store.asked) <= 7


async def test_a_caller_who_leaves_ends_no_look_of_others(store):
    """A cancelled request does not cancel the look that another one waits for."""
    store.latency_s = 0.1
    async with Replica(store, interval_s=3600.0) as replica:
        publish_generation(store, generation("one", "two"))
        gone = asyncio.create_task(replica.follower.catch_up(2))
        stays = asyncio.create_task(replica.follower.catch_up(2))
        await asyncio.sleep(0.05)
        gone.cancel()
        await stays
        assert replica.follower.standing.generation == 2


async def test_a_nudge_is_followed_at_once(store):
    """News of a new generation does not wait for the interval."""
    async with Replica(store, interval_s=3600.0) as replica:
        publish_generation(store, generation("one", "two"))
        replica.follower.nudge()
        await until(lambda: replica.took, 2)


async def test_a_replica_that_follows_nothing_says_so(store):
    """With interval 0 nothing is read, and who wants more is told to go elsewhere."""
    async with Replica(store, interval_s=0.0) as replica:
        await asyncio.wait_for(replica.task, 10)
        publish_generation(store, generation("one", "two"))
        with pytest.raises(ReplicaBehind, match="follows no deployment"):
            await replica.follower.catch_up(2)
        assert replica.follower.standing.state is State.FIXED
        assert replica.took == []


def test_behind_is_unavailable_with_a_time_to_retry():
    """A client knows when to come again, and the message has neither paths nor addresses."""
    fault = ReplicaBehind("expected generation 2")
    assert (fault.status, fault.reason) == (Status.UNAVAILABLE, "REPLICA_BEHIND")
    assert any("RetryInfo" in detail.type_url for detail in status_of(fault).details)


OTHER_BASE = {
    "base": generation().base.model_copy(update={"files": {"x": FileDigest(size=1, sha256="c" * 64)}})
}
SAME_BASE = {
    "base": generation().base.model_copy(
        update={"source": Repository(source=SourceKind.HF, repo="org/base", revision="2")}
    )
}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"adapters": {"x": record("y")}}, None),
        ({"served_model_name": "other", "serve_base": False}, None),
        ({"max_lora_rank": 8}, None),
        ({"lora_dtype": Dtype.FLOAT32}, None),
        (SAME_BASE, None),
        (OTHER_BASE, "another base"),
        ({"max_seq_len": 100}, "another max_seq_len: 100 instead of none"),
        ({"max_lora_rank": 17}, "a larger max_lora_rank: 17 instead of 16"),
        ({"serve_base": False}, None),
        ({"serve_base": False, "merge": Merge.ALWAYS}, "is to be merged"),
    ],
)
def test_what_needs_a_restart(fields, reason):
    """Names and versions come and go; what was sized or loaded at the start does not."""
    found = needs_restart(generation("one"), generation("one", **fields))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_merged_adapter_cannot_change():
    """It is part of the weights: another version, another name or company need a restart, the same does not."""
    merged = generation("one", serve_base=False)
    assert merged.merged == "one"
    assert needs_restart(merged, generation("one", serve_base=False)) is None
    for other in (
        generation("one", "two", serve_base=False),
        generation("one"),
        generation("one", serve_base=False, adapters={"one": record("one", "d" * 64)}),
        generation("one", serve_base=False, adapters={"two": record("one")}),
    ):
        assert "merged" in needs_restart(merged, other)


STEPS = st.lists(
    st.sampled_from(["publish", "restart", "tear", "mend", "away", "back", "look", "rewind"]), max_size=25
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_whatever_happens_numbers_only_grow(steps):
    """Over any history of a store, what is taken over is whole, newer each time, and in the end the newest."""

    async def history():
        store = Unsteady()
        first = publish_generation(store, generation("one"))
        replica = Replica(store, interval_s=3600.0)
        follower, count, good = replica.follower, 1, {}
        for step in steps:
            if step in {"publish", "restart"} and not store.away:
                if (good_pointer := good.pop("pointer", None)) is not None:
                    store.objects[current_key("d")] = good_pointer
                count += 1
                rank = 99 if step == "restart" else 16
                publish_generation(store, generation(f"n{count}", max_lora_rank=rank))
            elif step == "tear":
                good.setdefault("pointer", store.objects[current_key("d")])
                store.objects[current_key("d")] = good["pointer"][:20]
            elif step == "rewind":
                good.setdefault("pointer", store.objects[current_key("d")])
                store.objects[current_key("d")] = Current(
                    generation=1, sha256=sha256_hex(first.to_bytes())
                ).to_bytes()
            elif step == "mend" and "pointer" in good:
                store.objects[current_key("d")] = good.pop("pointer")
            elif step in {"away", "back"}:
                store.away = step == "away"
            elif step == "look":
                await follower._look()
                assert follower.standing.generation <= count
        store.away = False
        if "pointer" in good:
            store.objects[current_key("d")] = good.pop("pointer")
        await follower._look()
        assert replica.numbers == sorted(set(replica.numbers))
        assert all(new.max_lora_rank == 16 for new in replica.took)
        standing = follower.standing
        newest = Current.from_bytes(store.objects[current_key("d")]).generation
        assert standing.newest == newest
        assert (standing.generation == newest) == (standing.state is State.CURRENT)
        follower.close()

    asyncio.run(history())
