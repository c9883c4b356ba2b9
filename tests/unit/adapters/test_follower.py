"""Following a deployment: newer generations are taken over whole, once, and never backwards."""

import asyncio
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from inference_service.adapters import follower as following
from inference_service.adapters.follower import Follower, FollowerState, needs_restart
from loramux_shared.bundle.deployments import publish_generation, read_generation
from loramux_shared.bundle.generation import BaseRecord, current_key, generation_key
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Dtype, Merge, Repository, SourceKind
from loramux_shared.faults import ReplicaBehind, ResourcesExhausted
from tests.support import generations
from tests.support.generations import record
from tests.support.stores.bundles import UnsteadyStore
from tests.support.waiting import result_of, until

HOUR_S = 3600.0


def generation(*names, **fields):
    """A generation of adapters; its number is given when it is published."""
    values = {"deployment": "d", "served_model_name": "base", "max_lora_rank": 16} | other_base()
    return generations.generation(*names, **(values | fields))


def other_base(file="b", revision="1"):
    source = Repository(source=SourceKind.HF, repo="org/base", revision=revision)
    return {"base": BaseRecord(source=source, files={"x": FileDigest(size=1, sha256=file * 64)})}


@pytest.fixture(autouse=True)
def _read_again_at_once(monkeypatch):
    monkeypatch.setattr(following, "READ_AGAIN_S", (0.0, 0.0))


@pytest.fixture
def store():
    store = UnsteadyStore()
    publish_generation(store, generation("one"))
    store.asked.clear()
    return store


class Replica:
    """A replica that takes generations over."""

    def __init__(self, store, **options):
        self.took = []
        self.fails = 0
        options = {"interval_s": HOUR_S, "spacing_s": 0.0, "ends": True} | options
        self.follower = Follower(store, read_generation(store, "d", 1), self.take, **options)
        self.task = None

    def take(self, new):
        """Take a generation over, or fail as often as was asked for."""
        if self.fails:
            self.fails -= 1
            raise ResourcesExhausted("no room")
        self.took.append(new)

    async def look(self, times=1):
        """Look at the store, for a generation that never comes."""
        for _ in range(times):
            with suppress(ReplicaBehind):
                await result_of(self.follower.catch_up(10**9), "a look")

    @property
    def numbers(self):
        return [new.number for new in self.took]

    async def __aenter__(self):
        self.task = asyncio.create_task(self.follower.run())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.follower.close()


@pytest.mark.parametrize(
    "damage", ["pointer", "generation", "half pointer", "huge pointer", "missing generation", "no pointer"]
)
async def test_what_is_damaged_is_never_applied_and_tried_again(store, damage):
    """A damaged or half-written record is logged once, the replica serves on, and a repair is enough."""
    publish_generation(store, generation("one", "two"))
    pointer, newer = store.objects[current_key("d")], store.objects[generation_key("d", 2)]
    damaged = {
        "pointer": (pointer.replace(b'"generation":2', b'"generation":02'), newer),
        "half pointer": (pointer[: len(pointer) // 2], newer),
        "huge pointer": (pointer + b" " * 300_000, newer),
        "no pointer": (None, newer),
        "generation": (pointer, newer.replace(b"two", b"owt")),
        "missing generation": (pointer, None),
    }
    for key, data in zip((current_key("d"), generation_key("d", 2)), damaged[damage], strict=True):
        if data is None:
            del store.objects[key]
        else:
            store.objects[key] = data
    with capture_logs() as logs:
        async with Replica(store) as replica:
            await replica.look(3)
            assert replica.took == []
            assert replica.follower.standing.blind
            assert replica.follower.standing.state is FollowerState.BLIND
            store.objects[current_key("d")], store.objects[generation_key("d", 2)] = pointer, newer
            await replica.look()
            assert replica.numbers == [2]
            assert replica.follower.standing.blind == ""
    events = [line["event"] for line in logs if line["log_level"] == "warning"]
    assert len(events) == 1


async def test_a_store_that_is_away_is_logged_once_and_when_it_is_back(store):
    """An outage of the store is logged at its begin and at its end; the generation stays."""
    with capture_logs() as logs:
        async with Replica(store) as replica:
            store.away = True
            await replica.look(3)
            assert replica.follower.standing.blind
            assert replica.follower.standing.generation == 1
            store.away = False
            await replica.look()
            assert replica.follower.standing.state is FollowerState.CURRENT
    events = [line["event"] for line in logs]
    assert len(events) == 2
    assert "serves its present one" in events[0]
    assert "read again" in events[1]


async def test_a_lower_number_is_never_taken_over(store):
    """A pointer that goes back, as a restored copy of a store has it, is logged once and not followed."""
    old = store.objects[current_key("d")]
    publish_generation(store, generation("one", "two"))
    with capture_logs() as logs:
        async with Replica(store) as replica:
            await replica.look()
            store.objects[current_key("d")] = old
            await replica.look(3)
            assert replica.numbers == [2]
            assert replica.follower.standing.generation == 2
    assert len([line for line in logs if "older generation" in line["event"]]) == 1


async def test_what_needs_a_restart_is_reported_and_not_half_taken(store):
    """A stale replica keeps serving, reports the reason, signals once, and takes a later generation."""
    with capture_logs() as logs:
        async with Replica(store) as replica:
            publish_generation(store, generation("one", "two", max_seq_len=64))
            await replica.look(3)
            standing = replica.follower.standing
            assert (standing.generation, standing.newest, standing.state) == (1, 2, FollowerState.STALE)
            assert "another max_seq_len: 64 instead of none" in standing.stale
            assert replica.follower.outdated.is_set()
            with pytest.raises(ReplicaBehind, match="a restart"):
                await replica.follower.catch_up(2)
            publish_generation(store, generation("three"))
            await replica.look()
            assert replica.numbers == [3]
            assert replica.follower.standing.state is FollowerState.CURRENT
    assert len([line for line in logs if line["event"] == "generation needs a restart"]) == 1


async def test_a_generation_that_cannot_be_taken_is_tried_again(store):
    """A generation that fails while names are switched is stale with its reason until a later try succeeds."""
    async with Replica(store) as replica:
        replica.fails = 3
        publish_generation(store, generation("one", "two"))
        await replica.look(3)
        assert (replica.follower.standing.stale, replica.took) == ("no room", [])
        await replica.look()
        assert (replica.follower.standing.stale, replica.numbers) == ("", [2])


@pytest.fixture
async def held(store):
    """Return a replica in a look that has read the first generation, though a second is published."""
    old = store.objects[current_key("d")]
    publish_generation(store, generation("one", "two"))
    new, store.objects[current_key("d")] = store.objects[current_key("d")], old
    async with Replica(store) as replica:
        store.asked.clear()
        store.gate.clear()
        replica.first = asyncio.create_task(replica.look())
        await until(lambda: store.under_way, "a look")
        store.objects[current_key("d")] = new
        yield replica
        store.gate.set()
        await asyncio.gather(replica.first, return_exceptions=True)


async def test_who_joins_a_look_that_began_too_early_gets_another(store, held):
    """A caller during a look waits for a second look, which finds a generation published meanwhile."""
    late = asyncio.create_task(held.follower.catch_up(2))
    await asyncio.sleep(0)
    store.gate.set()
    await result_of(late, "the second look")
    assert held.numbers == [2]


async def test_looks_that_requests_ask_for_are_spaced(store, monkeypatch):
    """A client that asks for the impossible in a loop does not make the replica ask the store in a loop."""
    async with Replica(store, spacing_s=HOUR_S) as replica:
        await replica.look()
        loop, pauses = asyncio.get_running_loop(), []
        later = loop.call_later

        def at_once(delay, *arguments, **options):
            if delay > HOUR_S / 2:
                pauses.append(delay)
                delay = 0.0
            return later(delay, *arguments, **options)

        monkeypatch.setattr(loop, "call_later", at_once)
        await replica.look(4)
        assert len(pauses) == 4
        assert max(pauses) <= HOUR_S


async def test_a_caller_who_leaves_ends_no_look_of_others(store, held):
    """A cancelled request does not cancel the look at the store that another request awaits."""
    gone, stays = (asyncio.create_task(held.follower.catch_up(2)) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    held.first.cancel()
    await asyncio.sleep(0)
    store.gate.set()
    await result_of(stays, "the request that stays")
    assert held.follower.standing.generation == 2


async def test_a_replica_that_follows_nothing_says_so(store):
    """A replica with interval 0 reads nothing, and a request for a newer generation goes to another replica."""
    async with Replica(store, interval_s=0.0) as replica:
        await result_of(replica.task, "a follower of nothing")
        publish_generation(store, generation("one", "two"))
        with pytest.raises(ReplicaBehind, match="follows no deployment"):
            await replica.follower.catch_up(2)
        assert replica.follower.standing.state is FollowerState.FIXED
        assert replica.took == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"adapters": {"x": record("y")}}, None),
        ({"served_model_name": "other", "serve_base": False}, None),
        ({"max_lora_rank": 8}, None),
        ({"lora_dtype": Dtype.FLOAT32}, None),
        (other_base(revision="2"), None),
        (other_base("c"), "another base"),
        ({"max_seq_len": 100}, "another max_seq_len: 100 instead of none"),
        ({"max_lora_rank": 17}, "a larger max_lora_rank: 17 instead of 16"),
        ({"serve_base": False}, None),
        ({"serve_base": False, "merge": Merge.ALWAYS}, "is to be merged"),
    ],
)
def test_what_needs_a_restart(fields, reason):
    """Names and versions can change; sizes and weights of the start need a restart."""
    found = needs_restart(generation("one"), generation("one", **fields))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_merged_adapter_cannot_change():
    """Another version, name or second adapter beside a merged one needs a restart, the same does not."""
    merged = generation("one", serve_base=False)
    assert merged.merged == "one"
    assert needs_restart(merged, generation("one", serve_base=False)) is None
    for other in (
        generation("one", "two", serve_base=False),
        generation("one"),
        generation("one", serve_base=False, adapters={"one": record("other")}),
        generation("one", serve_base=False, adapters={"two": record("one")}),
    ):
        assert "merged" in needs_restart(merged, other)
