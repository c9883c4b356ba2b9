"""Steps in parts: shorter prompts run between two parts of a step, on a machine that moves the clock."""

import itertools
from typing import Any

import numpy as np
import pytest

from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, EndReason, Sequence, Share, StepOutput
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from inference_service.engine.scheduling.step_times import StepLoad, StepTimes
from loramux_shared.runtime import Pooling

PARTS = 10
ROW_S = 0.001
LONG = 200
_ids = itertools.count()


class Machine:
    """Computes a step in PARTS parts, of which each takes as long."""

    depth = 0

    def __init__(self) -> None:
        self.now_s = 0.0
        self.batches: list[Batch] = []
        self.raises_for = ""
        """A part behind the first raises for it."""

    def submit(self, batch: Batch) -> Pending:
        self.batches.append(batch)
        seqs, rows, left = [chunk.seq for chunk in batch.chunks], batch.num_tokens, PARTS

        def go_on() -> bool:
            nonlocal left
            if left < PARTS and self.raises_for in [seq.id for seq in seqs]:
                raise RuntimeError(left)
            if left:
                self.now_s += rows * ROW_S / PARTS
                left -= 1
            return left > 0

        return Pending((), list, go_on=go_on, vectors=lambda: [(seq, np.ones(1, np.float32)) for seq in seqs])


class Bank(Residents):
    """Counts the steps that may still read it."""

    reading = 0

    def submitted(self) -> None:
        self.reading += 1

    def resolved(self, *, everything: bool = False) -> None:
        self.reading = 0 if everything else self.reading - 1


class World:
    """An engine that computes prompts whole, and knows what rows cost."""

    def __init__(self) -> None:
        self.machine, self.bank = Machine(), Bank()
        limits = SchedulerLimits(1024, 64, max_adapters=2, max_seq_len=8192, whole=True, part_s=ROW_S)
        blocks = BlockManager(8192, 16)
        self.engine = Engine(self.machine, limits, blocks, self.bank, clock=lambda: self.machine.now_s)
        self.ends: list[StepOutput] = []
        self.ask(100)
        self.settle()
        self.ends.clear()

    def ask(self, length: int, **fields: Any) -> Sequence:
        number = next(_ids)
        fields = {"pooling": Pooling.MEAN} | fields
        seq = Sequence(str(number), [number] * length, SamplingParams(max_tokens=0), **fields)
        self.engine.add(seq)
        return seq

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.ends += self.engine.step()

    def settle(self) -> None:
        for _ in range(100 * PARTS):
            if self.engine.idle:
                assert not self.bank.reading
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    @property
    def ended(self) -> list[str]:
        return [output.seq_id for output in self.ends]


def test_a_short_prompt_ends_before_a_long_one_under_way() -> None:
    """The short one waits for a part at most, and the other ends later by that; its rows cost the same."""
    world = World()
    times: StepTimes = world.engine._scheduler.step_times
    cost_s, began_s = times.cost_s(0, LONG), world.machine.now_s
    long = world.ask(LONG)
    world.step(2)
    short, came_s = world.ask(10), world.machine.now_s
    world.step()
    assert world.ended == [short.id]
    assert world.bank.reading == 1
    assert world.machine.now_s - came_s == pytest.approx(10 * ROW_S)
    world.settle()
    assert world.ended == [short.id, long.id]
    assert world.machine.now_s - began_s == pytest.approx((LONG + 10) * ROW_S)
    assert times.cost_s(0, LONG) == pytest.approx(cost_s)


def test_endless_short_prompts_take_half_of_the_time_at_most() -> None:
    """The long one ends as if it had half of the machine."""
    world = World()
    long, began_s = world.ask(LONG), world.machine.now_s
    world.step()
    while long.id not in world.ended:
        for _ in range(4):
            world.ask(6)
        world.step()
    took_s = world.machine.now_s - began_s
    assert 1.5 * LONG * ROW_S < took_s <= (2 * LONG + 6) * ROW_S


@pytest.mark.parametrize(
    ("length", "fields"),
    [(LONG // 4 + 1, {}), (10, {"priority": -1}), (10, {"share": Share(background=True)})],
    ids=["hardly shorter", "less urgent", "background"],
)
def test_others_wait_for_the_end_of_the_step(length: int, fields: dict[str, Any]) -> None:
    """Nothing passes that would not pass what waits, and nothing that is not far shorter."""
    world = World()
    long = world.ask(LONG)
    world.step(2)
    other = world.ask(length, **fields)
    world.settle()
    assert world.ended == [long.id, other.id]


@pytest.mark.parametrize("first", [10, LONG])
def test_a_step_has_prompts_of_like_lengths(first: int) -> None:
    """The others have another, whichever came first; the shorter ones end first."""
    world = World()
    longer = [world.ask(LONG) for _ in range(2)] if first == LONG else []
    short = [world.ask(length) for length in (10, 40)]
    longer = longer or [world.ask(LONG) for _ in range(2)]
    world.settle()
    assert world.ended == [seq.id for seq in (*short, *longer)]
    lengths = [[chunk.length for chunk in batch.chunks] for batch in world.machine.batches[1:]]
    assert sorted(lengths) == [[10, 40], [LONG], [LONG]]


def test_an_adapter_that_arrives_between_two_parts_serves_there() -> None:
    """A short prompt that waits for its adapter begins in the pause behind its arrival."""
    world, adapter = World(), Adapter("a" * 64)
    long = world.ask(LONG)
    world.step(2)
    short = world.ask(10, adapter=adapter)
    world.step(2)
    assert not world.ended
    adapter.slot = 0
    world.bank.changes += 1
    world.settle()
    assert world.ended == [short.id, long.id]


def test_a_step_for_which_nobody_waits_is_not_computed_to_its_end() -> None:
    """A long prompt whose client gave up takes no further part; one beside another is computed with that."""
    world = World()
    alone, began_s = world.ask(LONG), world.machine.now_s
    world.step(2)
    world.engine.abort(alone.id)
    world.step()
    assert not world.bank.reading
    pair = [world.ask(40), world.ask(40)]
    world.step()
    world.engine.abort(pair[0].id)
    world.settle()
    assert world.ended == [pair[1].id]
    assert world.machine.now_s - began_s == pytest.approx((2 * LONG / PARTS + 80) * ROW_S)


@pytest.mark.parametrize("which", ["long", "short"])
def test_a_part_that_raises_ends_who_it_raises_for(which: str) -> None:
    """The other is computed again, and ends once."""
    world = World()
    long = world.ask(LONG)
    world.step(2)
    short = world.ask(30)
    bad = world.machine.raises_for = {"long": long, "short": short}[which].id
    for _ in range(20 * PARTS):
        try:
            world.step()
        except RuntimeError:
            world.ends += world.engine.set_aside()
            world.engine.retry()
    ends = [(output.seq_id, output.finish) for output in world.ends]
    expected = {long.id: EndReason.LENGTH, short.id: EndReason.LENGTH, bad: EndReason.FAILED}
    assert sorted(ends) == sorted(expected.items())
    world.settle()


def test_times_of_steps_within_others_are_told_apart() -> None:
    """The step around two others took what they did not."""
    times = StepTimes()
    times.submitted(StepLoad(0, 100, 0.0), 0.0)
    for begins_s in (1.0, 3.0):
        times.submitted(StepLoad(0, 10, 0.0), begins_s)
        times.resolved(begins_s + 0.5, between=True)
        assert times.num_submitted == 1
    times.resolved(6.0)
    assert times.cost_s(0, 1) == pytest.approx(0.05, rel=0.01)


def test_what_others_took_too_long_is_made_up_for_first() -> None:
    """One that takes as long as three parts is begun behind the first; the next one waits for the third."""
    world = World()
    world.ask(LONG)
    world.step()
    first = world.ask(LONG // 4)
    world.step()
    assert world.ended == [first.id]
    second = world.ask(LONG // 4)
    world.step()
    assert world.ended == [first.id]
    world.step(2)
    assert world.ended == [first.id, second.id]
