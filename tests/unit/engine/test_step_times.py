"""Chunks of prompts follow step times: engines whose runner takes the time that a machine would."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.engine.runner import Pending
from inference_service.engine.step_times import (
    LOOK,
    TIMES,
)

STREAMS = 8
LONG = 2000
_ids = itertools.count()


@dataclass
class Machine:
    """A runner, and the clock that it moves."""

    depth: int = 0
    step_s: float = 0.02
    row_s: float = 0.0006
    token_s: float = 5e-7
    """Cost of each token that a row of a prompt attends to."""
    decode_s: float = 0.0
    """Cost of each sequence that decodes."""
    now_s: float = 0.0
    free_s: float = 0.0
    batches: list[Batch] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)

    def submit(self, batch: Batch) -> Pending:
        """Be at work on a batch, behind the one before."""
        prompts = [chunk for chunk in batch.chunks if chunk.seq.progress.num_pending > 1]
        rows = sum(chunk.length * self.row_s for chunk in prompts)
        area = sum(chunk.length * (chunk.start + chunk.end) / 2 for chunk in prompts)
        decodes = (len(batch.chunks) - len(prompts)) * self.decode_s
        took_s = self.step_s + rows + area * self.token_s + decodes
        self.free_s = end_s = max(self.now_s, self.free_s) + took_s
        self.batches.append(batch)
        self.took_s.append(took_s)
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)

        def wait() -> list[Token]:
            self.now_s = max(self.now_s, end_s)
            return [Token(7)] * len(seqs)

        return Pending(seqs, wait)


def _engine(machine: Machine, max_tokens: int = 1024, max_seqs: int = 64) -> Engine:
    limits = SchedulerLimits(max_tokens, max_seqs, max_adapters=2, max_seq_len=8192)
    blocks = BlockManager(4096, 16)
    return Engine(machine, limits, blocks, AlwaysResident(), clock=lambda: machine.now_s)


def _with_64_streams(machine: Machine, **limits: int) -> Engine:
    """Return an engine in which 64 streams of one model decode, and whose step times are known."""
    engine = _engine(machine, **limits)
    _add(engine, _seq(8, 8000))
    for _ in range(5):
        engine.step()
    _add(engine, *(_seq(8, 8000) for _ in range(63)))
    for _ in range(30):
        engine.step()
    return engine


def _seq(prompt: int, new: int = 1, priority: int = 0, flow: str = "") -> Sequence:
    number = next(_ids)
    sampling = SamplingParams(max_tokens=new)
    return Sequence(str(number), [number] * prompt, sampling, priority=priority, flow=flow)


def _add(engine: Engine, *seqs: Sequence) -> tuple[Sequence, ...]:
    for seq in seqs:
        engine.add(seq)
    return seqs


def _streaming(machine: Machine) -> Engine:
    """Return an engine with streams that decode, and a runner that has forgotten how they began."""
    engine = _engine(machine)
    _add(engine, *(_seq(8, 8000) for _ in range(STREAMS)))
    for _ in range(10):
        engine.step()
    machine.batches.clear()
    machine.took_s.clear()
    return engine


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("row_s", "token_s"), [(0.0006, 5e-7), (0.0002, 2e-8), (0.002, 0.0)], ids=["steep", "flat", "slow"]
)
def test_a_step_beside_streams_takes_a_small_multiple(depth: int, row_s: float, token_s: float) -> None:
    """Hardly a step is three times as long as one that only decodes, for any cost of rows and their contexts,
    and the time that prompts may have is used.
    """
    machine = Machine(depth, row_s=row_s, token_s=token_s)
    engine = _streaming(machine)
    long = _add(engine, *(_seq(LONG) for _ in range(4)))
    while any(not seq.num_known for seq in long):
        engine.step()
    times = sorted(took / machine.step_s for took in machine.took_s)
    assert times[int(0.99 * len(times))] < 3.0
    assert times[len(times) // 2] == pytest.approx(TIMES, rel=0.1)


def test_a_first_step_that_takes_long_misleads_about_none() -> None:
    """Steps with prompts ignore the first decode, which compiles, and aim at the second one's time."""
    machine = Machine()
    engine = _engine(machine)
    _add(engine, *(_seq(16, new=2000) for _ in range(STREAMS)))
    engine.step()
    machine.step_s *= 8
    engine.step()
    machine.step_s /= 8
    _add(engine, *(_seq(LONG) for _ in range(2)))
    took = len(machine.took_s)
    for _ in range(12):
        engine.step()
    assert max(machine.took_s[took:]) / machine.step_s < 1.3 * TIMES


def test_a_machine_that_stood_still_once_is_not_taken_for_a_slow_one() -> None:
    """Prompts get nearly their usual share after two steps of two seconds each, with and without a prompt."""
    machine = Machine()
    engine = _streaming(machine)
    _add(engine, _seq(8000))
    for _ in range(40):
        engine.step()
    decode_s = machine.step_s
    usual = sorted(machine.took_s[-20:])[10]
    for look in (False, True):
        while (engine._scheduler.step_times._since_look >= LOOK) is not look:
            engine.step()
        machine.step_s = 2.0
        engine.step()
        assert (machine.batches[-1].num_tokens == STREAMS) is look
        machine.step_s = decode_s
    times = []
    for _ in range(20):
        engine.step()
        times.append(machine.took_s[-1])
    assert sorted(times)[10] == pytest.approx(usual, rel=0.1)
    assert max(times) < 3.2 * decode_s


def test_prompts_go_on_where_a_row_costs_more_than_they_may_have() -> None:
    """A few rows a step are always granted to prompts."""
    machine = Machine(row_s=0.5)
    engine = _streaming(machine)
    [long] = _add(engine, _seq(300))
    for _ in range(50):
        engine.step()
    assert long.num_known


def test_a_short_request_passes_long_prompts_of_its_own_model() -> None:
    """Four long prompts are under way, or wait before it: its first token comes all the same."""
    machine = Machine()
    engine = _streaming(machine)
    long = _add(engine, *(_seq(8000) for _ in range(4)))
    for _ in range(50):
        engine.step()
    for _ in range(10):
        came_s = machine.now_s
        [short] = _add(engine, _seq(64))
        while not short.num_known:
            engine.step()
        assert machine.now_s - came_s < 1.0
    assert not any(seq.num_known for seq in long)


def test_less_urgent_requests_do_not_pass_however_short_they_are() -> None:
    """The time is shared among the equally urgent."""
    machine = Machine()
    engine = _streaming(machine)
    [long] = _add(engine, _seq(LONG, priority=1))
    [short] = _add(engine, _seq(8))
    while not long.num_known:
        engine.step()
        assert long.num_known or not short.progress.num_computed


@pytest.mark.parametrize(("decode_s", "alone"), [(0.001, True), (0.0, False)], ids=["rows cost", "free rows"])
def test_a_first_token_of_another_model_does_not_wait_for_streams(decode_s: float, alone: bool) -> None:
    """A new model's prompt gets a separate step where steps of many streams are long."""
    machine = Machine(step_s=0.01, decode_s=decode_s)
    engine = _with_64_streams(machine)
    for number in range(4):
        [requests] = _add(engine, _seq(64, flow=f"once {number}"))
        engine.step()
        assert requests.num_known
        assert (len(machine.batches[-1].chunks) == 1) is alone
        _add(engine, _seq(64, flow=f"after {number}"))
        engine.step()
        assert len(machine.batches[-1].chunks) == 64
        engine.step()
        engine.step()
