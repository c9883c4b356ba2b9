"""Answers that hold NaN or infinity: they end, nothing of them is found, and their adapter goes out of use."""

import numpy as np
import pytest

from inference_service.core.adapter import Adapter, Mixture
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, EndReason, Sequence, StepOutput, Token
from inference_service.engine.engine import OVERFLOWS, WITHIN_S, Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import StateSlots
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from loramux_shared.runtime import Pooling

PROMPT = list(range(3, 15))


class Overflowing:
    """Draws a token that means nothing for every sequence of one adapter, and makes such vectors of it."""

    depth = 0

    def __init__(self, bad: Adapter) -> None:
        self.bad = bad

    def submit(self, batch: Batch) -> Pending:
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        drawn = tuple(seq for seq in seqs if seq.pooling is None)
        vectors = [(seq, np.array([0.0, self._value(seq)], np.float32)) for seq in seqs if seq.pooling]
        tokens = [Token(7, finite=bool(np.isfinite(self._value(seq)))) for seq in drawn]
        return Pending(drawn, lambda: tokens, vectors=lambda: vectors)

    def _value(self, seq: Sequence) -> float:
        return np.nan if self.bad in seq.adapters else 1.0


class World:
    """An engine, a bad adapter and a good one."""

    def __init__(self, **cache: StateSlots) -> None:
        self.bad, self.good = Adapter("b" * 64, slot=0), Adapter("a" * 64, slot=1)
        self.blocks = BlockManager(64, 4, **cache)
        self.now_s = 0.0
        limits = SchedulerLimits(64, 8, 4, max_seq_len=128)
        runner = Overflowing(self.bad)
        self.engine = Engine(runner, limits, self.blocks, Residents(), clock=lambda: self.now_s)

    def ask(self, name: str, adapter: Adapter | Mixture | None, **fields: object) -> StepOutput:
        params = SamplingParams(max_tokens=0 if "pooling" in fields else 2)
        self.engine.add(Sequence(name, list(PROMPT), params, adapter, model=name, **fields))  # type: ignore[arg-type]
        outputs = []
        while not outputs or not self.engine.idle:
            outputs += self.engine.step()
        assert [output.seq_id for output in outputs if output.finish] == [name]
        return outputs[-1]

    def reason(self, name: str, adapter: Adapter | Mixture | None, **fields: object) -> str:
        """Why a request failed; empty where it did not."""
        output = self.ask(name, adapter, **fields)
        assert (output.fault is not None) == (output.finish is EndReason.FAILED)
        return output.fault.reason if output.fault else ""


@pytest.mark.parametrize("fields", [{}, {"pooling": Pooling.LAST}], ids=["answer", "vector"])
def test_it_fails_and_nothing_of_it_is_found(fields: dict[str, object]) -> None:
    """A failed prompt leaves no blocks and states; those of other prompts with the same tokens stay."""
    states = StateSlots(12, 4, 1)
    world = World(states=states)
    assert world.reason("good", world.good, **fields) == ""
    world.blocks.keep()  # as the next step does
    retained = world.blocks.stats.hit, states.inspect().cached
    for _ in range(2):
        assert world.reason("bad", world.bad, **fields) == "NUMERICS"
    world.blocks.keep()
    assert (world.blocks.stats.hit, states.inspect().cached) == retained
    assert world.reason("good", world.good, **fields) == ""
    assert world.blocks.stats.hit == retained[0] + 8
    assert world.blocks.num_free == world.blocks.num_blocks


def test_after_three_within_a_minute_a_version_is_refused() -> None:
    """The version is refused alone and in blends; others are served, and rarer errors do not count."""
    world = World()
    for _ in range(OVERFLOWS - 1):
        assert world.reason("bad", world.bad) == "NUMERICS"
    world.now_s += WITHIN_S
    for _ in range(OVERFLOWS):
        assert world.bad.unusable is None
        assert world.reason("bad", world.bad) == "NUMERICS"
    blend = Mixture.of([(world.bad, 0.5), (world.good, 0.5)])
    assert world.reason("bad", world.bad) == world.reason("blend", blend) == "MODEL_UNUSABLE"
    assert world.reason("good", world.good) == world.reason("base", None) == ""
    assert world.reason("bad", Adapter("c" * 64, slot=0)) == ""  # another version


def test_a_blend_counts_for_none_of_its_adapters() -> None:
    """A blend's weights are the request's, so a failed blend does not disable an adapter."""
    world = World()
    blend = Mixture.of([(world.bad, 1e30), (world.good, 0.5)])
    assert [world.reason("blend", blend) for _ in range(OVERFLOWS + 1)] == ["NUMERICS"] * (OVERFLOWS + 1)
    assert world.bad.unusable is world.good.unusable is None
