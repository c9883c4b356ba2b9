"""Loads: each ends once, with a result or a named fault, and none blocks another."""

import asyncio
import threading
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from inference_service.adapters.disk import DiskTier
from inference_service.adapters.loader import LOADS, AdapterLoader
from inference_service.adapters.reading import BundleReader, Tier, _Room
from inference_service.adapters.recent import Recent
from inference_service.adapters.texts import AdapterTexts
from inference_service.adapters.workers import Workers
from inference_service.core.adapter import Adapter
from inference_service.text.text import Text
from loramux_shared import faults
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, bundle_key
from tests.support.stores.bundles import (
    TEMPLATE,
    FakePacked,
    KeepingReader,
    Loaded,
    UnsteadyStore,
    begin_load,
    build_bundles,
    flip_bit,
    load,
)
from tests.support.tokens import VOCAB, write_tokenizer
from tests.support.waiting import BOUND_S, result_of, until, wait_until

COUNT = 4


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store with a few bundles, which no test changes."""
    store = UnsteadyStore()
    store.digests = build_bundles(store, tmp_path_factory.mktemp("inputs"), COUNT)
    return store


@pytest.fixture
def store(built):
    return built.copied()


@pytest.fixture
def make(store):
    """Makes loaders that are closed at the end."""
    made = []

    def make(pack=FakePacked, disk=None, reader=None, **options):
        made.append(AdapterLoader(reader or BundleReader(store, disk), pack, **options))
        return made[-1]

    yield make
    store.gate.set()
    for loader in made:
        loader.close()


def test_loads_of_one_digest_at_once_are_one(store, make):
    """All callers of a digest get the result of one read of the store; a later caller causes another load."""
    store.gate.clear()
    loader, digest = make(), store.digests[0]
    outcomes = [begin_load(loader, digest) for _ in range(8)]
    store.gate.set()
    packed = {id(outcome().packed) for outcome in outcomes}
    assert len(packed) == 1
    key = bundle_key(digest, WEIGHTS_FILE)
    assert store.asked.count(key) == 1
    load(loader, digest)
    assert store.asked.count(key) == 2


def test_a_bundle_that_acts_from_other_tokens_than_its_generation_says_is_refused(store, make):
    """A bundle with other invocation tokens than its generation is refused, as requests have matched those."""
    outcome = begin_load(make(), store.digests[0], (5, 6))()
    assert isinstance(outcome, faults.BundleCorrupt)
    assert "invocation_tokens [5, 6] as the generation says, found []" in outcome.message


def test_the_host_tier_keeps_what_was_packed(store, make):
    """The host tier returns evicted adapters without a read, up to its bound; the oldest leave first."""
    loader = make(host_bytes=2500)
    first, second, third, _ = store.digests
    for digest in (first, second):
        load(loader, digest)
    count = len(store.asked)
    assert load(loader, first).tier is Tier.HOST
    assert len(store.asked) == count
    load(loader, third)
    assert loader.host_bytes == 2000
    assert load(loader, first).tier is Tier.HOST
    assert load(loader, second).tier is Tier.STORE
    loader.forget(first)
    assert load(loader, first).tier is Tier.STORE


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (faults.ProofFailed("adapter 'x': other answers"), faults.ProofFailed),
        (faults.BundleCorrupt("row 3"), faults.BundleCorrupt),
        (MemoryError(), faults.ResourcesExhausted),
        (torch.OutOfMemoryError("CUDA out of memory"), faults.ResourcesExhausted),
        (KeyError("/secret/path"), faults.InternalFault),
    ],
)
def test_a_failure_while_packing_is_reported_and_not_kept(store, make, raised, expected):
    """Any exception of packing ends the load with a named fault that leaks nothing; the next one works."""
    failing = [raised]

    def pack(bundle):
        if failing:
            raise failing.pop()
        return FakePacked(bundle)

    loader = make(pack, host_bytes=10**6)
    outcome = load(loader, store.digests[0])
    assert type(outcome) is expected
    assert "/secret" not in outcome.message
    assert isinstance(load(loader, store.digests[0]), Loaded)


@pytest.mark.parametrize("name", [MANIFEST_FILE, WEIGHTS_FILE, CONFIG_FILE, "chat_template.jinja"])
@pytest.mark.parametrize("cached", [False, True], ids=["store", "disk"])
def test_damage_after_a_load_is_never_served(store, make, tmp_path, name, cached):
    """The facts of a bundle from its first load belong to its digest: every byte is verified again."""
    digest, folder = store.digests[0], tmp_path / "bundles"
    key = bundle_key(digest, name)
    loader = make(disk=DiskTier(folder, 10**9) if cached else None)
    first = load(loader, digest)
    if cached:
        wait_until((folder / digest).exists, "the copy on the disk")
    right = store.objects[key]
    store.objects[key] = flip_bit(right)
    if cached:
        assert load(loader, digest).tier is Tier.DISK
        (folder / digest / name).write_bytes(flip_bit(right))
    assert type(load(loader, digest)) is faults.BundleCorrupt
    store.objects[key] = right
    again = load(loader, digest)
    assert again.tier is Tier.STORE
    assert np.array_equal(again.packed.bundle.table, first.packed.bundle.table)


def test_urgent_work_goes_before_packing_that_waits(store, make):
    """A copy runs before the bundles that wait to be packed."""
    order, go, begun = [], threading.Event(), threading.Event()

    def pack(bundle):
        begun.set()
        assert go.wait(BOUND_S)
        order.append("packed")
        return FakePacked(bundle)

    loader = make(pack, reader=(reader := KeepingReader(store, None)))
    loads = [begin_load(loader, digest) for digest in store.digests]
    assert begun.wait(BOUND_S)
    reader.await_kept(COUNT)  # now the others wait to be packed
    outcomes = SimpleQueue()
    loader.run(lambda: order.append("copied"), outcomes.put)
    go.set()
    for outcome in loads:
        outcome()
    assert order == ["packed", "copied", *["packed"] * (COUNT - 1)]


def test_a_callback_that_raises_blocks_no_other(store, make):
    """A callback that raises does not stop the other callbacks of its load, nor later loads."""
    store.gate.clear()
    loader, digest = make(), store.digests[0]
    loader.load(Adapter(digest), lambda *_: 1 / 0)
    outcome = begin_load(loader, digest)
    store.gate.set()
    assert isinstance(outcome(), Loaded)
    assert isinstance(load(loader, store.digests[1]), Loaded)


def test_whatever_waits_at_the_end_is_reported(store, make):
    """A close ends queued work with SHUTTING_DOWN, and refuses new work at once."""
    packing, go = threading.Event(), threading.Event()

    def pack(bundle):
        packing.set()
        assert go.wait(BOUND_S)
        return FakePacked(bundle)

    loader = make(pack)
    first = begin_load(loader, store.digests[0])
    assert packing.wait(BOUND_S)
    store.gate.clear()
    outcomes = [begin_load(loader, f"{number:064x}") for number in range(3 * LOADS)]
    wait_until(lambda: store.under_way == LOADS - 1, "loads that read", lambda: store.under_way)
    worked = SimpleQueue()
    loader.run(lambda: 1, worked.put)
    loader.close()
    go.set()
    store.gate.set()
    assert type(first()) is Loaded
    kinds = [type(outcome()) for outcome in outcomes]
    assert (kinds.count(faults.BundleCorrupt), kinds.count(faults.ShuttingDown)) == (LOADS - 1, 2 * LOADS + 1)
    assert type(worked.get(timeout=BOUND_S)) is faults.ShuttingDown
    assert type(load(loader, store.digests[0])) is faults.ShuttingDown


def test_reads_share_a_bound_of_memory():
    """Reads together stay within the bound; something larger than it goes alone."""
    room, came = _Room(100), SimpleQueue()

    def take(size):
        with room.taken(size):
            came.put(size)

    def begin(size):
        threading.Thread(target=take, args=(size,), daemon=True).start()

    with room.taken(60):
        for size in (1000, 41):  # there is no room for either
            begin(size)
        begin(40)
        assert came.get(timeout=BOUND_S) == 40
        assert came.empty()
    assert {came.get(timeout=BOUND_S) for _ in range(2)} == {1000, 41}
    with room.taken(1000):
        begin(1)
        assert came.empty()
    assert came.get(timeout=BOUND_S) == 1


def test_recent_values_stay_within_their_bound():
    """The least recently used leave first; one that is larger than the bound replaces nothing."""
    recent = Recent(10)
    for name, size in (("a", 4), ("b", 4), ("a", 5)):
        recent.put(name, name * size, size)
    assert (recent.size, len(recent), recent.get("a")) == (9, 2, "aaaaa")
    recent.put("c", "c", 3)
    assert recent.get("b") is None
    recent.put("d", "d", 11)
    assert (recent.get("d"), recent.get("a"), recent.get("c")) == (None, "aaaaa", "c")


def test_cancelled_workers_tell_their_futures():
    """Closed workers finish running work and cancel waiting and new work."""
    workers = Workers("test", 1)
    go = threading.Event()
    running, waits = workers.submit(lambda: go.wait(BOUND_S)), workers.submit(lambda: 1)
    wait_until(running.running, "work that runs")
    workers.close()
    workers.close()
    go.set()
    assert running.result(BOUND_S)
    assert waits.cancelled()
    assert workers.submit(lambda: 1).cancelled()


@pytest.fixture
def texts(store, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder)
    texts = AdapterTexts(BundleReader(store, None), Text.load(folder, VOCAB))
    yield texts
    store.gate.set()
    texts.close()


async def test_texts_do_not_wait_for_weights(store, texts):
    """A template is read without the weights, once for all callers, and then cached."""
    digest = store.digests[0]
    assert await texts.texts(digest) == {"chat_template.jinja": TEMPLATE.encode()}
    store.asked.clear()
    store.gate.clear()
    asking = [asyncio.create_task(texts.defaults(digest, "a0")) for _ in range(5)]
    await until(lambda: store.under_way, "a reading")
    store.gate.set()
    several = await result_of(asyncio.gather(*asking), "all who ask")
    assert all(defaults is several[0] for defaults in several)
    assert several[0].template is not None
    assert store.asked == [bundle_key(digest, name) for name in (MANIFEST_FILE, "chat_template.jinja")]
    assert await texts.defaults(digest, "a0") is several[0]
    assert len(store.asked) == 2


async def test_texts_that_fail_are_read_again(store, texts):
    """A failed read and a cancelled caller are not cached: the next caller reads the store again."""
    digest = store.digests[0]
    store.away = True
    store.gate.clear()
    gone, stays = (asyncio.create_task(texts.defaults(digest, "a0")) for _ in range(2))
    await until(lambda: store.under_way, "a reading")
    gone.cancel()
    store.gate.set()
    with pytest.raises(faults.StoreUnavailable):
        await result_of(stays, "the other caller")
    store.away = False
    assert (await texts.defaults(digest, "a0")).template is not None


def test_a_thread_that_cannot_begin_ends_the_start() -> None:
    """The maker of the threads gets what one of them raised, and waits for none."""

    def prepare() -> None:
        raise OSError("no core")

    with pytest.raises(OSError, match="no core"):
        Workers("test", 3, prepare)
