"""Residency: which adapters are in the bank. No model: loads end when the test ends them."""

import itertools
import math
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings, strategies as st

from inference_service.core.adapter import Adapter, Mixture
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, EndReason, Sequence, StepOutput, Token
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.lora.places import Places
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residency import FIRST_PAUSE_S, LAST_PAUSE_S, LOADS, Residency
from inference_service.engine.scheduling.residents import AdapterState
from loramux_shared.faults import BundleCorrupt, Fault, InternalFault, ResourcesExhausted
from tests.support.examples import examples
from tests.support.waiting import BOUND_S, wait_until

UNIT = 64
_ids = itertools.count()


@dataclass(frozen=True)
class Matrices:
    """A stand-in for an adapter's matrices."""

    digest: str
    num_bytes: int


@dataclass
class FakeBank:
    """Memory that knows whose its bytes are."""

    size: int
    bytes_of: dict[int, str] = field(default_factory=dict)
    """Owner of each unit of memory."""
    slots: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    refuses: set[tuple[str, str]] = field(default_factory=set)
    """Operations and digests for which it refuses them."""

    def copy(self, packed: Matrices, offset: int) -> None:
        """Write; the bytes of slots in use are not touched."""
        self._expect("copy", packed)
        units = range(offset // UNIT, -(-(offset + packed.num_bytes) // UNIT))
        assert units.stop <= self.size // UNIT
        for _, start, size in self.slots.values():
            assert not set(units) & set(range(start // UNIT, -(-(start + size) // UNIT)))
        self.bytes_of |= dict.fromkeys(units, packed.digest)

    def enter(self, slot: int, offset: int, packed: Matrices) -> None:
        assert slot not in self.slots
        self._expect("enter", packed)
        self.slots[slot] = packed.digest, offset, packed.num_bytes

    def leave(self, slot: int) -> None:
        del self.slots[slot]

    def _expect(self, what: str, packed: Matrices) -> None:
        if (what, packed.digest) in self.refuses:
            raise InternalFault("not this one")

    def read(self, slot: int, digest: str) -> None:
        """Read as a step does: all bytes are the adapter's."""
        found, offset, size = self.slots[slot]
        assert found == digest
        assert {self.bytes_of[unit] for unit in range(offset // UNIT, -(-(offset + size) // UNIT))} == {digest}


class FakeLoader:
    """Ends what was begun when it is told to, in any order."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.broken: set[str] = set()
        self.begun: list[Callable[[], None]] = []
        self.loaded: list[str] = []
        self.packed: list[weakref.ref[Matrices]] = []

    def load(self, adapter: Adapter, done: Callable[[Matrices | Fault, str], None]) -> None:
        digest = adapter.digest

        def end() -> None:
            self.loaded.append(digest)
            if digest in self.broken:
                done(BundleCorrupt(f"bundle {digest}"), "")
            else:
                packed = Matrices(digest, self.sizes[digest])
                self.packed.append(weakref.ref(packed))
                done(packed, "store")

        self.begun.append(end)

    def run(self, work: Callable[[], None], done: Callable[[Fault | None], None]) -> None:
        """Begin to copy: the bytes are written when it ends."""

        def end() -> None:
            try:
                work()
            except Fault as fault:
                done(fault)
            else:
                done(None)

        self.begun.append(end)

    def end_one(self, which: int = 0) -> None:
        self.begun.pop(which % len(self.begun))()


class FakeRunner:
    """Reads the bank when a step is resolved, as a device does at any time until then."""

    def __init__(self, bank: FakeBank, depth: int) -> None:
        self.depth = depth
        self.batches: list[Batch] = []
        self._bank = bank

    def submit(self, batch: Batch) -> Pending:
        seqs_of = [chunk.seq for chunk in batch.chunks]
        reads = [(adapter.slot, adapter.digest) for seq in seqs_of for adapter in seq.adapters]
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        self.batches.append(batch)

        def wait() -> list[Token]:
            for slot, digest in reads:
                assert slot is not None
                self._bank.read(slot, digest)
            return [Token(7)] * len(seqs)

        return Pending(seqs, wait)


class World:
    """An engine whose bank has some units, and adapters of so many units each."""

    def __init__(self, units, sizes, depth=0, seqs=4, adapters=3, slots=64, wait_s=0.0) -> None:
        self.adapters = [Adapter(f"{number:02x}" * 32) for number in range(len(sizes))]
        self.loader = FakeLoader(
            {adapter.digest: size * UNIT for adapter, size in zip(self.adapters, sizes, strict=True)}
        )
        self.bank = FakeBank(units * UNIT)
        self.now_s = 0.0
        self.commands: deque[Callable[[], None]] = deque()
        self.residency = Residency(
            Places(units * UNIT),
            slots,
            self.bank,
            self.loader,
            self.commands.append,
            clock=lambda: self.now_s,
            wait_s=wait_s,
        )
        self.runner = FakeRunner(self.bank, depth)
        self.blocks = BlockManager(200, 4)
        limits = SchedulerLimits(16, seqs, adapters, max_seq_len=400)
        self.engine = Engine(self.runner, limits, self.blocks, self.residency, clock=lambda: self.now_s)
        self.asked: list[Sequence] = []
        self.ends: dict[str, StepOutput] = {}
        self.aborted: set[str] = set()

    def ask(self, *numbers: int, new: int = 3, flow: str | None = None, key_id: str = "") -> Sequence:
        """Send a request for an adapter, or a mixture of several, or the base."""
        name = str(next(_ids))
        tokens = [int(name) * 1000 + index for index in range(3)]
        parts = [(self.adapters[number], 1.0 if len(numbers) == 1 else 0.5) for number in numbers]
        flow = str(numbers) if flow is None else flow
        seq = Sequence(
            name, tokens, SamplingParams(max_tokens=new), Mixture.of(parts), flow=flow, key_id=key_id
        )
        self.asked.append(seq)
        self.engine.add(seq)
        return seq

    @property
    def is_awake(self) -> bool:
        """Return True if the engine's thread does not sleep."""
        return bool(self.commands) or self.engine.idle_until_s <= self.now_s

    def step(self, times: int = 1) -> None:
        """Run the engine's thread: posted commands, then a step."""
        for _ in range(times):
            while self.commands:
                self.commands.popleft()()
            for output in self.engine.step():
                if output.finish:
                    assert output.seq_id not in self.ends
                    self.ends[output.seq_id] = output

    def settle(self, steps: int = 5000) -> None:
        """Step as the engine's thread does, which sleeps, and end what has begun, until nothing is left."""
        self.step()
        for _ in range(steps):
            if self.is_awake:
                self.step()
            elif self.loader.begun:
                self.loader.end_one()
            else:
                assert self.engine.idle, "requests wait and the engine sleeps"
                return
        raise AssertionError("requests never end")

    def answer(self, *numbers: int) -> None:
        """Send a request for each of these adapters, one after the other, and continue to its end."""
        for number in numbers:
            self.ask(number)
            self.settle()

    def run(self, times: int) -> None:
        """Go on for some steps, after each of which one thing ends that was begun."""
        for _ in range(times):
            self.step()
            if self.loader.begun:
                self.loader.end_one()

    def abort(self, seq: Sequence) -> None:
        if seq.id not in self.ends:
            self.engine.abort(seq.id)
            self.aborted.add(seq.id)

    def resident(self) -> set[int]:
        return {number for number, adapter in enumerate(self.adapters) if adapter.slot is not None}


def test_who_is_copied_at_once_misses_no_step() -> None:
    """A copy ends on another thread while a step waits for it, and the step has the rows."""
    world, thread = World(4, [1, 1], wait_s=BOUND_S), threading.get_ident()

    def step_waits() -> bool:
        return sys._current_frames()[thread].f_code is Residency._end_copies.__code__

    def run(work: Callable[[], None], done: Callable[[Fault | None], None]) -> None:
        def copy() -> None:
            work()
            wait_until(step_waits, "a step that waits for copies")
            done(None)

        threading.Thread(target=copy).start()

    world.loader.run = run  # type: ignore[method-assign]
    requests = [world.ask(0, new=1), world.ask(1, new=1)]
    world.step()
    world.loader.end_one()
    world.loader.end_one()
    world.step()
    assert set(world.ends) == {each.id for each in requests}


def test_a_pinned_adapter_stays_and_comes_back_by_itself() -> None:
    """A pinned adapter is not evicted; one that is unpinned is."""
    world = World(2, [1, 1, 1])
    world.residency.pin(world.adapters[0])
    world.settle()
    world.answer(1, 2, 1, 2)
    assert 0 in world.resident()
    world.residency.unpin(world.adapters[0])
    world.answer(1, 2)
    assert world.resident() == {1, 2}


def test_what_fits_beside_no_pin_is_refused_by_name() -> None:
    """An adapter that never fits, or not beside the pinned ones, is refused with that reason."""
    world = World(4, [3, 2, 5])
    world.residency.pin(world.adapters[0])
    world.settle()
    small, large = world.ask(1), world.ask(2)
    world.settle()
    for seq, stated in ((small, "pinned"), (large, "does not fit")):
        with pytest.raises(ResourcesExhausted, match=stated):
            raise world.ends[seq.id].fault


def test_prefetching_later_takes_one_at_a_time_and_only_what_fits() -> None:
    """Prefetching in the background loads one adapter at a time, evicts none, and ends."""
    world = World(3, [1] * 8)
    world.residency.prefetch_later(world.adapters)
    world.step()
    for _ in range(40):
        if world.is_awake:
            world.step()
        assert len(world.loader.begun) <= 1
        if world.loader.begun:
            world.loader.end_one()
    assert world.resident() == {0, 1, 2}
    assert world.residency.settled
    assert world.residency.stats.evictions == 0
    world.residency.prefetch(world.adapters[1])
    world.answer(3, 4)
    assert world.resident() == {2, 3, 4}
    assert len(world.loader.loaded) == len(world.adapters) + 2  # those that left do not come back by themselves


@pytest.mark.parametrize("what", ["copy", "enter"])
def test_a_bank_that_refuses_an_adapter_fails_that_one_alone(what: str) -> None:
    """A failed copy or entry ends the requests of its adapter, and frees its memory."""
    world = World(4, [1, 1])
    world.bank.refuses = {(what, world.adapters[0].digest)}
    bad, good = world.ask(0), world.ask(1)
    world.settle()
    assert world.ends[bad.id].fault is not None
    assert world.ends[good.id].finish is EndReason.LENGTH
    assert world.residency.num_bytes == UNIT
    failure: Any = world.residency.standing(world.adapters[0]).failure
    assert failure.__traceback__ is None  # which would hold its matrices
    world.residency.drop(world.adapters[0])
    assert world.residency.standing(world.adapters[0]).failure is None


def test_a_failed_load_ends_those_who_wait_and_nobody_else() -> None:
    """A request says why; for a pause the next ones say the same at once, and then one tries again."""
    world = World(4, [1, 1])
    world.loader.broken = {world.adapters[0].digest}
    waiting, other = [world.ask(0), world.ask(0)], world.ask(1)
    world.settle()
    assert all(isinstance(world.ends[seq.id].fault, BundleCorrupt) for seq in waiting)
    assert world.ends[other.id].fault is None
    loads = len(world.loader.loaded)
    early = world.ask(0)
    world.settle()
    assert isinstance(world.ends[early.id].fault, BundleCorrupt)
    assert len(world.loader.loaded) == loads
    world.loader.broken = set()
    world.now_s += FIRST_PAUSE_S + 0.1
    late = world.ask(0)
    world.settle()
    assert world.ends[late.id].finish is EndReason.LENGTH
    assert world.residency.standing(world.adapters[0]).failure is None


def test_a_pinned_adapter_that_failed_is_tried_again_when_nobody_asks() -> None:
    """A pinned adapter that failed is loaded again after pauses that double up to a bound."""
    world = World(4, [1])
    world.loader.broken = {world.adapters[0].digest}
    world.residency.pin(world.adapters[0])
    world.step()
    world.loader.end_one()
    world.step()
    for pause_s in (FIRST_PAUSE_S, 2.0, 4.0, 8.0, 16.0, 32.0, LAST_PAUSE_S, LAST_PAUSE_S):
        assert world.engine.idle_until_s == pytest.approx(world.now_s + pause_s)
        world.now_s += pause_s
        world.step()
        world.loader.end_one()
        world.step()
    world.loader.broken = set()
    world.now_s += LAST_PAUSE_S
    world.settle()
    assert world.resident() == {0}


def test_an_adapter_that_is_no_longer_wanted_takes_no_place() -> None:
    """A request is aborted while its adapter loads, whose prefetch had failed before: nothing is left."""
    world = World(4, [1])
    world.loader.broken = {world.adapters[0].digest}
    world.residency.prefetch(world.adapters[0])
    world.settle()
    world.loader.broken = set()
    world.now_s += FIRST_PAUSE_S
    seq = world.ask(0)
    world.step()
    world.abort(seq)
    world.settle()
    assert not world.resident()
    assert world.residency.settled
    world = World(1, [1, 1])
    world.ask(0, new=300)
    world.run(4)
    seq = world.ask(1)
    world.run(2)
    assert not world.residency.settled  # it is here, and waits for the only place
    world.abort(seq)
    assert world.residency.settled


def test_a_model_that_waited_for_its_adapter_has_saved_nothing() -> None:
    """Once it is there, the model has as many rows as the other one."""
    world = World(4, [1], seqs=2)
    for numbers in ((), (), (), (0,), (0,), (0,)):
        world.ask(*numbers, new=300)
    world.step(100)
    world.runner.batches.clear()
    world.run(100)
    rows = Counter(chunk.seq.flow for batch in world.runner.batches for chunk in batch.chunks)
    assert rows["(0,)"] == pytest.approx(rows["()"], rel=0.25)


def test_mixtures_that_want_the_same_places_take_turns() -> None:
    """Four endless blends share two places: none deadlocks, no place is idle, and each has its share."""
    world = World(2, [1] * 5, adapters=2)
    requests = [world.ask(*group, new=300) for group in ((0, 1), (2, 3), (1, 2), (3, 0), (4,))]
    world.settle(20000)
    assert all(world.ends[seq.id].finish is EndReason.LENGTH for seq in requests)
    first = world.runner.batches[: len(world.runner.batches) // 2]
    rows = Counter(chunk.seq.id for batch in first for chunk in batch.chunks)
    assert min(rows[seq.id] for seq in requests) > 50


def test_a_mixture_that_no_bank_of_this_size_holds_is_refused_and_nobody_else() -> None:
    """A blend that exceeds the bank is refused with its bytes; others answer."""
    world = World(3, [2, 2, 1])
    big, one, other = world.ask(0, 1), world.ask(0), world.ask(2, 0)
    world.settle()
    with pytest.raises(ResourcesExhausted, match=r"2 adapters of 256 bytes.*192 bytes in one piece"):
        raise world.ends[big.id].fault
    assert {world.ends[each.id].finish for each in (one, other)} == {EndReason.LENGTH}


def test_the_least_urgent_adapter_leaves_first() -> None:
    """One that nobody waits for leaves before those that are waited for, and none for a less urgent one."""
    world = World(3, [1] * 6)
    world.answer(0, 1, 2)
    order = (3, 4, 0, 1, 5)
    ranks = {world.adapters[number]: (float(rank), (0, 0)) for rank, number in enumerate(order)}
    for adapter in ranks:
        world.residency.want(adapter)
    for _ in range(4):
        world.residency.bring_in(ranks)
        while world.loader.begun:
            world.loader.end_one()
        while world.commands:
            world.commands.popleft()()
    assert world.resident() == {0, 3, 4}
    assert world.residency.stats.evictions == 2


def test_loads_are_shared_by_keys() -> None:
    """A key that is alone has all loads but one, the next has the last, and of two each comes to half."""
    world = World(70, [1] * 60, seqs=70, adapters=70)

    def loads() -> Counter[str]:
        ended = AdapterState.ABSENT, AdapterState.RESIDENT
        return Counter(each.key_id for each in world.residency.standings() if each.state not in ended)

    requests = [world.ask(number, key_id="a") for number in range(30)]
    world.step()
    assert loads() == {"a": LOADS - 1}
    requests += [world.ask(number, key_id="b") for number in range(30, 60)]
    world.step()
    assert loads() == {"a": LOADS - 1, "b": 1}
    requests.append(world.ask(29, key_id="c"))
    seen = list[Counter[str]]()
    while not seen or seen[-1]["c"] or seen[-1]["a"] == LOADS - 1:
        world.run(1)
        seen.append(loads())
    first = next(each for each in seen if each["a"] < LOADS - 1)
    assert first == {"a": LOADS - 2, "b": 1, "c": 1}, "a key whose adapter another key waits for in vain"
    assert {"a": LOADS // 3, "b": LOADS // 3, "c": 1} in seen
    assert seen[-1] == {"a": LOADS // 2, "b": LOADS // 2 - 1}
    world.settle()
    assert world.residency.settled
    assert all(world.ends[seq.id].finish is EndReason.LENGTH for seq in requests)


def test_a_failed_step_holds_no_adapter() -> None:
    """Steps under way are over when one fails, and what they read may leave."""
    world = World(1, [1, 1], depth=1)
    world.ask(0, new=9)
    world.run(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.bank, "read", MagicMock(side_effect=RuntimeError))
        with pytest.raises(RuntimeError):
            world.step(2)
    world.engine.fail_all()
    world.answer(1)
    assert world.resident() == {1}


def test_users_far_ahead_do_not_take_a_place_in_turns_that_another_waits_for() -> None:
    """A queue that had much service passes its place in the bank to one that waits."""
    world = World(1, [1, 1], seqs=2)
    for user in "abcdef":
        world.ask(0, new=300, flow=user)
    world.run(100)
    late = world.ask(1)
    world.run(30)
    assert late.id in world.ends


def test_no_stream_makes_room_while_an_adapter_leaves() -> None:
    """A step still reads the adapter of a stream that has ended: it will leave, and no other needs to."""
    world = World(2, [1] * 3, depth=1, seqs=9)
    streams = [world.ask(*numbers, new=99) for numbers in ((0,), (1,), (1,), ())]
    world.run(20)
    world.ask(2)
    world.step()
    world.loader.end_one()
    world.abort(streams[0])
    world.settle()
    assert world.engine.stats.preemptions == 0


def test_slots_are_as_many_as_there_are() -> None:
    """A full table of slots evicts one even where bytes are free, and no other where one makes room."""
    world = World(4, [1, 3, 3], slots=2)
    world.answer(0, 1, 2)
    assert world.resident() == {0, 2}
    world = World(10, [1, 1, 1], slots=2)
    world.answer(0, 1, 2, 2)
    assert world.resident() == {1, 2}
    counted = {"loads": 3, "loads_by_tier": {"store": 3}, "load_counts": [3, *[0] * 12], "load_seconds": 0.0}
    assert vars(world.residency.stats) == counted | {"failures": 0, "evictions": 1, "waits": 3}


def test_an_adapter_that_is_waited_for_is_not_dropped() -> None:
    """A version that a waiting request needs stays when its name goes."""
    world = World(4, [1], seqs=1)
    world.answer(0)
    world.ask(new=50)
    world.step()
    world.ask(0)
    world.residency.drop(world.adapters[0])
    assert world.resident() == {0}


def test_an_engine_sleeps_while_loads_are_on_their_way() -> None:
    """A load that waits for others is nothing to wake up for, nor is one that is to be tried again."""
    world = World(20, [1] * (LOADS + 2))
    world.loader.broken = {world.adapters[-1].digest}
    world.residency.pin(world.adapters[-1])
    world.settle()
    world.ask(0)
    world.step()
    for number in range(1, LOADS + 1):
        world.ask(number)
    world.now_s += FIRST_PAUSE_S
    world.step()
    assert len(world.loader.begun) == LOADS
    assert world.engine.idle_until_s == math.inf


ASK = st.tuples(
    st.lists(st.integers(0, 6), max_size=3, unique=True),
    st.sampled_from([1, 3, 40]),
    st.sampled_from(["", "f"]),
)
OTHER = st.tuples(
    st.sampled_from(["step", "end", "abort", "break", "repair", "pin", "unpin", "prefetch", "drop", "wait"]),
    st.integers(0, 6),
)


def _act(world: World, action: tuple[list[int], int, str] | tuple[str, int], most: int) -> Sequence | None:
    """Do one thing; return the request, if that was it, for as many adapters at most."""
    if len(action) == 3:
        numbers, new, flow = action
        return world.ask(*numbers[:most], new=new, flow=flow or None)
    what, which = action
    adapter, residency = world.adapters[which], world.residency
    match what:
        case "end" if world.loader.begun:
            world.loader.end_one(which)
        case "abort" if world.asked:
            world.abort(world.asked[which % len(world.asked)])
        case "break":
            world.loader.broken.add(adapter.digest)
        case "repair":
            world.loader.broken.discard(adapter.digest)
        case "wait":
            world.now_s += 1.0
        case "pin" if which < 2:
            residency.pin(adapter)
        case "unpin" | "prefetch" | "drop":
            getattr(residency, what)(adapter)
        case _:
            world.step()
    return None


@settings(max_examples=examples(140), deadline=None)
@given(
    st.lists(st.one_of(ASK, OTHER), min_size=1, max_size=80),
    st.lists(st.integers(1, 3), min_size=7, max_size=7),
    st.integers(3, 8),
    st.integers(0, 1),
    st.integers(1, 3),
)
def test_every_request_ends_once_on_its_own_digest(actions, sizes, units, depth, adapters) -> None:
    """Every step reads the digests that its sequences name; each request ends once, and nothing stays held."""
    world = World(units, sizes, depth, adapters=adapters)
    requests = [seq for action in actions if (seq := _act(world, action, adapters)) is not None]
    world.settle()
    for adapter in world.adapters:
        world.residency.unpin(adapter)
    world.settle()
    assert {seq.id for seq in requests} == set(world.ends) | world.aborted
    assert all(standing.in_flight == standing.waiting == 0 for standing in world.residency.standings())
    assert world.blocks.num_free == world.blocks.num_blocks
    taken = sum(-(-size // UNIT) * UNIT for _, _, size in world.bank.slots.values())
    assert world.residency.num_bytes == taken
    for adapter in world.adapters:
        world.residency.drop(adapter)
    assert world.residency.num_bytes == 0
    assert world.residency.settled
    assert not [*world.bank.slots, *world.residency.standings()]
    assert all(packed() is None for packed in world.loader.packed)
