"""What the host does for a step, counted: it follows the sequences of the step, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks import host
from benchmarks.host import BLOCK_SIZE, Bench, Point
from tests.support import instructions as support

SEQS = 12
BASE = Point("decode", SEQS, context=256, loaded=64)


def instructions(point: Point) -> float:
    """Count the interpreter's instructions of a step, over as many steps as sequences take to need a block."""
    bench = Bench(point)
    return support.instructions(lambda: [bench.step() for _ in range(BLOCK_SIZE)]) / BLOCK_SIZE


@pytest.fixture(scope="module")
def usual() -> float:
    return instructions(BASE)


@pytest.mark.parametrize(
    "other",
    [
        Point("decode", SEQS, context=4096, loaded=64),
        Point("decode", SEQS, context=256, loaded=8),
        Point("decode", SEQS, context=256, loaded=1000),
    ],
    ids=["longer contexts", "fewer adapters", "more adapters"],
)
def test_a_step_costs_what_its_sequences_do(usual: float, other: Point) -> None:
    """However long their contexts are, and however many adapters are loaded beside those that they use."""
    assert instructions(other) == pytest.approx(usual, rel=0.02)


def test_a_step_costs_no_more_than_its_share_with_more_sequences(usual: float) -> None:
    """Nothing is quadratic: four times the sequences are at most four times the work."""
    assert instructions(Point("decode", 4 * SEQS, context=256, loaded=64)) < 4 * usual


def test_blocks_are_copied_as_they_are() -> None:
    """A block table is int32 in memory, which a step copies however long it is, not a list to be converted."""
    bench = Bench(Point("decode", 2, context=256, loaded=0))
    for seq in bench.running:
        view = memoryview(seq.blocks)
        assert (view.format, view.itemsize, view.contiguous) == ("i", 4, True)


@pytest.mark.parametrize("kind", ["starved", "crowded"])
@pytest.mark.parametrize("context", [256, 4096])
def test_a_queue_costs_a_step_next_to_nothing(kind: host.Kind, context: int) -> None:
    """Neither a head that waits for blocks, however long the prefix that it finds, nor a thousand whose
    adapters are on their way."""
    alone = instructions(Point("decode", SEQS, context, loaded=64))
    assert instructions(Point(kind, SEQS, context, loaded=64)) < alone + 50 * SEQS


@pytest.mark.sweep
def test_the_bars_of_host_time_are_met() -> None:
    """On a quiet machine, by the thread's own time."""
    assert host.main(["--kind", "decode", "--loaded", "64", "1000"]) == 0
