"""Drafts follow the cost of their rows and the acceptance rate: engines whose runner moves the clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.engine.runner import Pending
from inference_service.engine.step_times import LOOK_WITHOUT_DRAFTS

STEP_S = 0.02
DRAFTED = 8
DRAW = random.Random(0)
Text = Callable[[str, int], int]
"""A token, by its stream and its position."""


def repetitive(_: str, __: int) -> int:
    """Every draft holds."""
    return 7


def circle(_: str, position: int) -> int:
    """Every draft holds once the text has come round."""
    return 100 + position % 20


def coins(_: str, __: int) -> int:
    """Something is always found, and half of the tokens hold."""
    return 7 + DRAW.randrange(2)


def ordinary(_: str, position: int) -> int:
    """Runs of ten tokens that came before, and ten that did not."""
    return 100 + position % 10 if position // 10 % 2 else 1000 + position


@dataclass
class Machine:
    """A runner, and the clock that it moves."""

    text: Text
    row_s: float
    """Cost of each row of a draft."""
    depth: int = 0
    now_s: float = 0.0
    rows: int = 0
    """Rows of drafts in the last step."""

    def submit(self, batch: Batch) -> Pending:
        """Draw the tokens of a batch, which takes its time."""
        self.rows = sum(chunk.drafted for chunk in batch.chunks)
        self.now_s += STEP_S + self.rows * self.row_s
        seqs, tokens = [], []
        for chunk in batch.chunks:
            for position in range(chunk.end - chunk.drafted, chunk.end + 1):
                seqs.append(chunk.seq)
                tokens.append(Token(self.text(chunk.seq.id, position)))
        return Pending(tuple(seqs), lambda: tokens, drafts=batch.drafts)


def _engine(machine: Machine, streams: int, drafted: int = DRAFTED) -> Engine:
    """Return an engine with streams whose prompts are known."""
    limits = SchedulerLimits(1024, 64, max_adapters=2, max_seq_len=8192, speculative_tokens=drafted)
    engine = Engine(machine, limits, BlockManager(8192, 16), AlwaysResident(), clock=lambda: machine.now_s)
    for number in range(streams):
        engine.add(Sequence(str(number), [number], SamplingParams(max_tokens=8000)))
    engine.step()
    return engine


def _token_s(machine: Machine, engine: Engine, steps: int) -> float:
    """Return the seconds of a token, over steps to come."""
    began_s, before = machine.now_s, engine.stats.tokens_generated
    for _ in range(steps):
        engine.step()
    return (machine.now_s - began_s) / (engine.stats.tokens_generated - before)


@pytest.mark.parametrize("streams", [1, 8, 20])
@pytest.mark.parametrize("part", [0.2, 0.6, 3.0], ids=["cheap", "dear", "very dear"])
@pytest.mark.parametrize("text", [repetitive, circle, coins, ordinary])
def test_drafts_never_cost(text: Text, part: float, streams: int) -> None:
    """Drafts never cost, for any cost of a row and any share of drafts that hold, once that is known."""
    machine = Machine(text, part * STEP_S / streams)
    engine = _engine(machine, streams)
    _token_s(machine, engine, 150)
    assert _token_s(machine, engine, 200) < STEP_S / streams / 0.98


@pytest.mark.parametrize("streams", [1, 8])
def test_drafts_stop_where_rows_cost_what_they_save_and_come_back_where_they_are_free(streams: int) -> None:
    """The engine stops drafts where a row costs more than a token, and measures the cost now and then."""
    machine = Machine(repetitive, 1.2 * STEP_S / streams)
    engine = _engine(machine, streams)
    _token_s(machine, engine, 100)
    before = engine.stats
    _token_s(machine, engine, 100)
    tokens = engine.stats.tokens_generated - before.tokens_generated
    assert engine.stats.tokens_drafted - before.tokens_drafted < 0.1 * tokens
    machine.row_s = 0.0
    _token_s(machine, engine, 800)
    assert _token_s(machine, engine, 100) < STEP_S / streams / 3


def test_what_a_step_takes_without_drafts_stays_known() -> None:
    """A machine that became slower altogether drafts as before."""
    machine = Machine(repetitive, 0.0)
    engine = _engine(machine, 1)
    rows = []
    for _ in range(3 * LOOK_WITHOUT_DRAFTS):
        engine.step()
        rows.append(machine.rows)
    assert 2 <= rows[10:].count(0) <= 4
