"""The host's work for a step, counted: it follows the sequences of the step, and nothing else."""

import itertools
from collections.abc import Callable

import pytest

from benchmarks import host
from benchmarks.host import ACTIVE, BLOCK_SIZE, Bench, Point
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from tests.unit.engine.instructions import instructions as count

SEQS = 12
ANSWER = 4
"""Tokens."""
BASE = Point("decode", SEQS, context=256, loaded=64)


def instructions(point: Point) -> float:
    """Count the interpreter's instructions of a step, over as many steps as sequences take to need a block."""
    return counted(Bench(point).step, BLOCK_SIZE)


def counted(step: Callable[[], object], steps: int) -> float:
    return count(lambda: [step() for _ in range(steps)]) / steps


class Immediate:
    """A runner that draws a token at once."""

    depth = 0

    def submit(self, batch: Batch) -> Pending:
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        return Pending(seqs, lambda: [Token(7)] * len(seqs))


def coming_and_going(seqs: int, *, waiting: int, queues: int, adapters: int) -> Callable[[], None]:
    """Return a step of an engine whose sequences end after ANSWER tokens, each followed by another."""
    limits = SchedulerLimits(4 * seqs, seqs, ACTIVE, max_seq_len=64)
    blocks = BlockManager(8 * seqs, BLOCK_SIZE, prefix_cache=False)
    engine = Engine(Immediate(), limits, blocks, Residents(), clock=lambda: 0.0)
    known = [Adapter(f"{number:064x}", number) for number in range(adapters)]
    numbers = itertools.count()

    def add() -> None:
        number = next(numbers)
        new = ANSWER if number >= seqs else 1 + number % ANSWER  # so that as many end in every step
        params, flow = SamplingParams(max_tokens=new), str(number % queues)
        engine.add(Sequence(str(number), [1, 2], params, known[number % adapters], flow=flow))

    def step() -> None:
        for output in engine.step():
            if output.finish:
                add()

    for _ in range(seqs + waiting):
        add()
    for _ in range(4 * ANSWER):
        step()
    return step


def test_a_step_costs_what_its_sequences_do() -> None:
    """A step's work depends on its sequences, not on the length of contexts nor on other loaded adapters."""
    usual = instructions(BASE)
    for context, loaded in ((4096, 64), (256, 1000)):
        assert instructions(Point("decode", SEQS, context, loaded)) == pytest.approx(usual, rel=0.02)
    assert instructions(Point("decode", 4 * SEQS, context=256, loaded=64)) < 4 * usual


@pytest.mark.parametrize("queues", [1, 1000], ids=["one queue", "a queue each"])
def test_admission_costs_what_is_admitted(queues: int) -> None:
    """Four times as many admitted sequences are as much more work, in one queue or in one each."""
    few, many = (coming_and_going(seqs, waiting=4, queues=queues, adapters=ACTIVE) for seqs in (24, 96))
    assert counted(many, ANSWER) < 4.4 * counted(few, ANSWER)


def test_who_finds_no_place_costs_the_others_little() -> None:
    """A step asks, of 400 that wait for places of adapters, as many as there are places, and one more."""
    few, many = (coming_and_going(24, waiting=count, queues=1, adapters=count) for count in (100, 400))
    assert counted(many, ANSWER) < 2.5 * counted(few, ANSWER)


def test_blocks_are_copied_as_they_are() -> None:
    """A block table is int32 in memory, which a step copies however long it is, not a list to be converted."""
    bench = Bench(Point("decode", 2, context=256, loaded=0))
    for seq in bench.running:
        view = memoryview(seq.progress.blocks)
        assert (view.format, view.itemsize, view.contiguous) == ("i", 4, True)


@pytest.mark.parametrize(("kind", "context"), [("starved", 4096), ("crowded", 256)])
def test_a_queue_costs_a_step_next_to_nothing(kind: host.Kind, context: int) -> None:
    """A waiting head with a long prefix and a thousand sequences with loading adapters cost a step little."""
    alone = instructions(Point("decode", SEQS, context, loaded=64))
    assert instructions(Point(kind, SEQS, context, loaded=64)) < alone + 50 * SEQS


@pytest.mark.sweep
def test_the_bars_of_host_time_are_met() -> None:
    """The benchmark of the host's time finds all of its bars met."""
    assert host.main([]) == 0
