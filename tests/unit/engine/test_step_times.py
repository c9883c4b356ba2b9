"""Chunks of prompts and drafts follow step times: engines whose runner takes the time that a machine would."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.lookup import FIRST_PROBABILITY, TOKEN_LEARNING_RATE, Expected, Lookup
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from inference_service.engine.scheduling.scheduler import MAX_WHOLE_STEP_S
from inference_service.engine.scheduling.step_times import (
    MAX_PREFILL_STEP_S,
    MAX_STEP_RATIO,
    PROBE_INTERVAL_STEPS,
    StepLoad,
    StepTimes,
)

STREAMS = 8
LONG = 2000
DRAW = random.Random(0)
Text = Callable[[str, int], int]
"""A token, by its stream and its position."""
_ids = itertools.count()


def repetitive(_: str, __: int) -> int:
    """Every draft holds."""
    return 7


def coins(_: str, __: int) -> int:
    """Something is always found, and half of the tokens hold."""
    return 7 + DRAW.randrange(2)


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
    draft_s: float = 0.0
    """Cost of each row of a draft."""
    text: Text = repetitive
    now_s: float = 0.0
    free_s: float = 0.0
    batches: list[Batch] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)

    def submit(self, batch: Batch) -> Pending:
        prompts = [chunk for chunk in batch.chunks if chunk.seq.progress.num_pending > 1]
        rows = sum(chunk.length * self.row_s for chunk in prompts)
        area = sum(chunk.length * (chunk.start + chunk.end) / 2 for chunk in prompts)
        decodes = (len(batch.chunks) - len(prompts)) * self.decode_s
        drafts = sum(chunk.drafted for chunk in batch.chunks) * self.draft_s
        took_s = self.step_s + rows + area * self.token_s + decodes + drafts
        self.free_s = end_s = max(self.now_s, self.free_s) + took_s
        self.batches.append(batch)
        self.took_s.append(took_s)
        places = [
            (chunk.seq, position)
            for chunk in batch.chunks
            if chunk.samples
            for position in range(chunk.end - chunk.drafted, chunk.end + 1)
        ]
        tokens = [Token(self.text(seq.id, position)) for seq, position in places]

        def wait() -> list[Token]:
            self.now_s = max(self.now_s, end_s)
            return tokens

        return Pending(tuple(seq for seq, _ in places), wait, drafts=batch.drafts)


def _engine(
    machine: Machine,
    drafted: int = 0,
    *,
    prefill_first: bool = False,
    lookup: Lookup | None = None,
    step_times: StepTimes | None = None,
) -> Engine:
    limits = SchedulerLimits(1024, 64, 2, 8192, speculative_tokens=drafted, prefill_first=prefill_first)
    blocks = BlockManager(8192, 16)
    return Engine(machine, limits, blocks, Residents(), lambda: machine.now_s, lookup, step_times)


def _run(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.step()


def _seq(prompt: int, new: int = 1, priority: int = 0, flow: str = "") -> Sequence:
    number = next(_ids)
    sampling = SamplingParams(max_tokens=new)
    return Sequence(str(number), [number] * prompt, sampling, priority=priority, flow=flow)


def _add(engine: Engine, *seqs: Sequence) -> tuple[Sequence, ...]:
    for seq in seqs:
        engine.add(seq)
    return seqs


def _with_64_streams(machine: Machine) -> Engine:
    """Return an engine in which 64 streams of one model decode, and whose step times are known."""
    engine = _engine(machine)
    _add(engine, _seq(8, 8000))
    for more in (62, 1):
        _run(engine, 15)
        _add(engine, *(_seq(8, 8000) for _ in range(more)))
    _run(engine, 15)
    return engine


def _streaming(machine: Machine, step_times: StepTimes | None = None) -> Engine:
    """Return an engine with streams that decode, and a runner that has forgotten how they began."""
    engine = _engine(machine, step_times=step_times)
    _add(engine, *(_seq(8, 8000) for _ in range(STREAMS)))
    _run(engine, 10)
    machine.batches.clear()
    machine.took_s.clear()
    return engine


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("row_s", "token_s"), [(0.0006, 5e-7), (0.0002, 2e-8), (0.002, 0.0)], ids=["steep", "flat", "slow"]
)
def test_a_step_beside_streams_takes_a_small_multiple(depth: int, row_s: float, token_s: float) -> None:
    """Hardly a step is three times as long as a decode, and the time that prompts may have is used."""
    machine = Machine(depth, row_s=row_s, token_s=token_s)
    engine = _streaming(machine)
    long = _add(engine, *(_seq(LONG) for _ in range(4)))
    while any(not seq.num_known for seq in long):
        engine.step()
    times = sorted(took / machine.step_s for took in machine.took_s)
    assert times[int(0.99 * len(times))] < 3.0
    assert times[len(times) // 2] == pytest.approx(MAX_STEP_RATIO, rel=0.1)


def test_prompts_are_computed_first_where_nobody_waits_for_single_tokens() -> None:
    """The same prompts and answers take fewer steps, none of which is longer than a step of prompts alone."""
    steps = []
    for prefill_first in (False, True):
        machine = Machine()
        engine = _engine(machine, prefill_first=prefill_first)
        _add(engine, *(_seq(100, 40) for _ in range(60)))
        while not engine.idle:
            engine.step()
        steps.append(len(machine.batches))
        assert max(machine.took_s[1:]) < 1.1 * MAX_PREFILL_STEP_S
    assert steps[1] < 0.6 * steps[0]


def test_a_machine_that_stood_still_once_is_not_taken_for_a_slow_one_for_long() -> None:
    """Prompts get about their usual share again after two steps of two seconds, of which one has no prompt."""
    machine, times_known = Machine(), StepTimes()
    engine = _streaming(machine, times_known)
    _add(engine, *(_seq(8000) for _ in range(6)))
    _run(engine, 2 * PROBE_INTERVAL_STEPS)
    decode_s = machine.step_s
    usual = sorted(machine.took_s[-20:])[10]
    for look in (False, True):
        while (times_known.room_s(STREAMS) is None) is not look:
            engine.step()
        machine.step_s = 2.0
        engine.step()
        assert (machine.batches[-1].num_tokens == STREAMS) is look
        machine.step_s = decode_s
    _run(engine, 5 * PROBE_INTERVAL_STEPS)
    times = sorted(machine.took_s[-20:])
    assert times[10] == pytest.approx(usual, rel=0.1)
    assert times[-1] < 3.2 * decode_s


def test_prompts_go_on_where_a_row_costs_more_than_they_may_have() -> None:
    """A prompt advances even where one row takes longer than its budget."""
    engine = _streaming(Machine(row_s=0.5))
    [long] = _add(engine, _seq(300))
    _run(engine, 50)
    assert long.num_known


def _whole(machine: Machine) -> Engine:
    """Return an engine that computes all of a prompt in one step."""
    limits = SchedulerLimits(1024, 64, max_adapters=2, max_seq_len=8192, whole=True)
    return Engine(machine, limits, BlockManager(8192, 16), Residents(), clock=lambda: machine.now_s)


def test_prompts_that_are_computed_whole_share_a_step_as_far_as_they_fit() -> None:
    """Once it is known what rows cost, a step has as many of such prompts as its time allows."""
    machine = Machine(row_s=0.0004)
    engine = _whole(machine)
    _add(engine, *(_seq(64) for _ in range(40)))
    while not engine.idle:
        engine.step()
    assert {len(batch.chunks) for batch in machine.batches[1:-1]} == {int(MAX_WHOLE_STEP_S / 0.0256)}


@pytest.mark.parametrize("flow", ["", "another"])
def test_a_short_prompt_waits_for_one_long_one_that_is_computed_whole(flow: str) -> None:
    """The next step has it, however many of those wait; endless short ones leave every other step to these."""
    machine = Machine(row_s=0.0005)
    engine = _whole(machine)
    long = _add(engine, *(_seq(512) for _ in range(32)))
    _run(engine, 1)
    for ended in range(3, 33):
        [short] = _add(engine, _seq(16, flow=flow))
        _run(engine, 1)
        assert short.num_known
        assert {chunk.length for chunk in machine.batches[-1].chunks} == {16}
        _add(engine, _seq(16, flow=flow))
        _run(engine, 1)
        assert sum(seq.num_known for seq in long) == ended


def test_a_short_request_passes_long_prompts_of_its_own_model() -> None:
    """Four long prompts are under way, or wait before it: its first token comes all the same."""
    machine = Machine()
    engine = _streaming(machine)
    long = _add(engine, *(_seq(8000) for _ in range(4)))
    _run(engine, 50)
    for _ in range(10):
        came_s = machine.now_s
        [short] = _add(engine, _seq(64))
        while not short.num_known:
            engine.step()
        assert machine.now_s - came_s < 1.0
    assert not any(seq.num_known for seq in long)


def test_less_urgent_requests_do_not_pass_however_short_they_are() -> None:
    """The time is shared among the equally urgent."""
    engine = _streaming(Machine())
    [long] = _add(engine, _seq(LONG, priority=1))
    [short] = _add(engine, _seq(8))
    while not long.num_known:
        engine.step()
        assert long.num_known or not short.progress.num_charged


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
        _run(engine, 2)


def _drafting(machine: Machine, streams: int, lookup: Lookup | None = None) -> Engine:
    """Return an engine that drafts eight tokens, with streams whose prompts are known."""
    DRAW.seed(0)
    engine = _engine(machine, drafted=8, lookup=lookup)
    _add(engine, *(_seq(1, new=8000) for _ in range(streams)))
    engine.step()
    return engine


def _token_s(machine: Machine, engine: Engine, steps: int) -> float:
    began_s, before = machine.now_s, engine.stats.tokens_generated
    _run(engine, steps)
    return (machine.now_s - began_s) / (engine.stats.tokens_generated - before)


@pytest.mark.parametrize("streams", [1, 8, 20])
@pytest.mark.parametrize("part", [0.2, 0.6, 3.0], ids=["cheap", "dear", "very dear"])
@pytest.mark.parametrize("text", [repetitive, coins])
def test_drafts_never_cost(text: Text, part: float, streams: int) -> None:
    """Drafts never cost, for any cost of a row and any share of drafts that hold, once that is known."""
    machine = Machine(text=text)
    machine.draft_s = part * machine.step_s / streams
    engine = _drafting(machine, streams)
    _run(engine, 150)
    assert _token_s(machine, engine, 200) < machine.step_s / streams / 0.98
    [served] = engine.inspect().served.values()  # drafts that held are charged as other tokens are
    assert served == sum(chunk.seq.progress.num_computed for chunk in machine.batches[-1].chunks)
    drafted = sum(chunk.drafted for batch in machine.batches for chunk in batch.chunks)
    assert engine.stats.tokens_drafted == drafted


@pytest.mark.parametrize("streams", [1, 8])
def test_drafts_stop_where_rows_cost_what_they_save_and_come_back_where_they_are_free(streams: int) -> None:
    """The engine stops drafts where a row costs more than a token, and measures the cost now and then."""
    machine = Machine()
    machine.draft_s = 1.2 * machine.step_s / streams
    engine = _drafting(machine, streams)
    _run(engine, 100)
    before = engine.stats
    _run(engine, 100)
    tokens = engine.stats.tokens_generated - before.tokens_generated
    assert engine.stats.tokens_drafted - before.tokens_drafted < 0.1 * tokens
    machine.draft_s = 0.0
    _run(engine, 800)
    assert _token_s(machine, engine, 100) < machine.step_s / streams / 3


def test_what_a_step_takes_without_drafts_stays_known() -> None:
    """A machine that became slower altogether drafts as before."""
    machine = Machine()
    _run(_drafting(machine, 1), 3 * PROBE_INTERVAL_STEPS)
    rows = [sum(chunk.drafted for chunk in batch.chunks) for batch in machine.batches[11:]]
    assert 2 <= rows.count(0) <= 4


class Counting(Lookup):
    """Counts how often a sequence is looked at."""

    looks = 0

    def expect(self, seq: Sequence, most: int) -> Expected:
        self.looks += 1
        return super().expect(seq, most)


def test_streams_that_nothing_is_drafted_for_are_looked_at_in_few_steps() -> None:
    """Each of 32 streams in which nothing comes twice is looked at in every third step."""
    lookup = Counting()
    engine = _drafting(Machine(text=lambda _, position: position), 32, lookup)
    _run(engine, 9)
    before = lookup.looks
    _run(engine, 30)
    assert lookup.looks - before == 32 * 30 / 3


def test_the_background_takes_part_as_far_as_it_is_known_to_cost_little() -> None:
    """One more than known is tried; what is known to lengthen a step too much is left out, and tried again."""
    times = StepTimes()
    seconds = {1: 0.1, 2: 0.1, 3: 0.105, 4: 0.2}
    now_s = 0.0
    for number, took in seconds.items():
        times.submitted(StepLoad(number, 0, 0.0), now_s)
        now_s += took
        times.resolved(now_s)
    spare = times.spare_s(1)
    *usual, tried = [times.beside(1, spare) for _ in range(PROBE_INTERVAL_STEPS)]
    assert (set(usual), tried) == ({2}, 3)
    assert times.beside(4, times.spare_s(4)) == 1
    assert times.spare_s(9) == 0.0


def test_a_draft_counts_up_to_its_first_miss() -> None:
    """Tokens behind a miss say nothing of a draft: they follow another text."""
    expected = Expected(tokens=[1, 2, 3])
    expected.follow([1, 9, 3])
    assert expected.chance == pytest.approx(
        FIRST_PROBABILITY + TOKEN_LEARNING_RATE * (1 - FIRST_PROBABILITY) - TOKEN_LEARNING_RATE * 0.55
    )
