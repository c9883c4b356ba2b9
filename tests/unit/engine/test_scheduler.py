"""Scheduling: budgets, fairness, preemption. No model: a step gives every sampled sequence one token."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from inference_service.core.adapter import Adapter, Mixture
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, EndReason, Sequence, Share, Token
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling import queues
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import FIRST_BACKGROUND_COUNTER, SchedulerLimits, SequenceQueues
from inference_service.engine.scheduling.residents import Residents
from inference_service.engine.scheduling.scheduler import MAX_RECOMPUTED_SHARE, QUANTUM_TOKENS
from inference_service.engine.scheduling.step_times import StepTimes
from tests.support.examples import examples

ADAPTERS = [Adapter(f"{number:064x}", slot=number) for number in range(40)]
BLENDS = 100
"""From here on, numbers are of an adapter and the next one together."""
_ids = itertools.count()


class FakeRunner:
    """Answers with a fixed token and keeps the batches."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.batches: list[Batch] = []
        self.again = 0
        """Rows that were computed before."""

    def submit(self, batch: Batch) -> Pending:
        """Note a batch; every chunk's blocks must cover its context."""
        for chunk in batch.chunks:
            assert len(chunk.seq.progress.blocks) * 4 >= chunk.end
            self.again += max(0, min(chunk.length, chunk.seq.progress.num_charged - chunk.end + chunk.length))
        self.batches.append(batch)
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        return Pending(seqs, lambda: [Token(7)] * len(seqs))


def _engine(*, blocks=64, max_tokens=16, max_seqs=4, max_adapters=2, depth=0, step_times=None):
    manager = BlockManager(blocks, 4)
    runner = FakeRunner(depth)
    limits = SchedulerLimits(max_tokens, max_seqs, max_adapters, max_seq_len=blocks * 4)
    engine = Engine(runner, limits, manager, Residents(), clock=lambda: 0.0, step_times=step_times)
    return engine, runner, manager


def _seq(prompt: int, new: int, uid: int = 0, priority: int = 0, **fields: Any) -> Sequence:
    number = next(_ids)
    tokens = [number * 1000 + index for index in range(prompt)]  # no shared prefixes by accident
    parts = ADAPTERS[uid - 1 : uid] if uid < BLENDS else ADAPTERS[uid - BLENDS :][:2]
    adapter = Mixture.of([(part, 1 / len(parts)) for part in parts]) if uid else None
    return Sequence(str(number), tokens, SamplingParams(max_tokens=new), adapter, priority, **fields)


def _drain(engine: Engine, steps: int = 3000) -> dict[str, EndReason]:
    ends: dict[str, EndReason] = {}
    for _ in range(steps):
        if engine.idle:
            return ends
        for output in engine.step():
            if output.finish:
                assert output.seq_id not in ends
                ends[output.seq_id] = output.finish
    raise AssertionError("the engine did not come to an end")


def _add(engine: Engine, *seqs: Sequence) -> None:
    for seq in seqs:
        engine.add(seq)


def _run(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.step()


def _steps(engine: Engine, seq: Sequence, most: int, *, first: bool = False) -> int:
    """Return how many steps a request takes to its end, or to its first token."""
    for steps in range(1, most + 1):
        outputs = [output for output in engine.step() if output.seq_id == seq.id]
        if any(output.first if first else output.finish for output in outputs):
            return steps
    raise AssertionError("it starves")


@pytest.mark.parametrize("rows", [8, 2])
def test_decodes_come_before_a_long_prompt_and_share_its_step(rows: int) -> None:
    """A prompt has at least a row, since settings allow no more sequences than rows."""
    engine, runner, _ = _engine(max_tokens=rows, max_seqs=2)
    short, long = _seq(3, 20), _seq(20, 1)
    engine.add(short)
    _run(engine, 3)  # what it takes to decode alone is known now
    engine.add(long)
    engine.step()
    lengths = {chunk.seq.id: chunk.length for chunk in runner.batches[-1].chunks}
    assert lengths == {short.id: 1, long.id: rows - 1}


def test_a_higher_priority_is_admitted_first() -> None:
    """A sequence of a higher priority is admitted before earlier ones."""
    engine, runner, _ = _engine(max_seqs=1)
    seqs = [_seq(2, 1), _seq(2, 1), _seq(2, 1, priority=5)]
    _add(engine, *seqs)
    _drain(engine)
    order = [batch.chunks[0].seq.id for batch in runner.batches]
    assert order == [seqs[2].id, seqs[0].id, seqs[1].id]


REQUEST = st.tuples(
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([0, 1, 2, 3, 4, BLENDS, BLENDS + 1]),
    st.integers(0, 2),
    st.sampled_from([None, None, None, -1.0]),
)


@settings(max_examples=examples(80), deadline=None)
@given(
    st.lists(st.one_of(REQUEST, st.just("step"), st.just("abort")), min_size=1, max_size=40), st.integers(8, 30)
)
def test_budgets_hold_and_every_request_ends_once(actions: list[object], num_blocks: int) -> None:
    """No arrivals, aborts or preemptions exceed a bound; each request ends once, and all blocks come back."""
    engine, runner, blocks = _engine(blocks=num_blocks, max_tokens=16, max_seqs=4, max_adapters=2)
    added: dict[str, Sequence] = {}
    aborted: set[str] = set()
    ends: list[str] = []
    for action in actions:
        if action == "step":
            ends += [output.seq_id for output in engine.step() if output.finish]
        elif action == "abort":
            open_ids = [seq_id for seq_id in added if seq_id not in ends and seq_id not in aborted]
            if open_ids:
                engine.abort(open_ids[0])
                aborted.add(open_ids[0])
        elif isinstance(action, tuple):
            prompt, new, uid, priority, deadline = action
            seq = _seq(min(prompt, num_blocks * 4 - new), new, uid, priority, deadline_s=deadline)
            added[seq.id] = seq
            engine.add(seq)
    ends += list(_drain(engine))
    assert sorted(ends) == sorted(set(added) - aborted)
    assert blocks.num_free == blocks.num_blocks
    assert not engine.stats.waiting
    assert {name for name, left in vars(engine._scheduler.queues).items() if left} <= {"lowest", "_smallest"}
    for batch in runner.batches:
        assert batch.num_tokens <= 16
        assert len(batch.chunks) <= 4
        assert len({adapter for chunk in batch.chunks for adapter in chunk.seq.adapters}) <= 2
        assert len({chunk.seq.id for chunk in batch.chunks}) == len(batch.chunks)


def _served(runner: FakeRunner) -> Counter[str]:
    rows: Counter[str] = Counter()
    for batch in runner.batches:
        for chunk in batch.chunks:
            rows[chunk.seq.flow] += chunk.length
    return rows


def test_flows_are_served_by_their_weights() -> None:
    """A model of three times the weight gets three times the tokens, however many requests the other sends."""
    engine, runner, _ = _engine(max_seqs=4, blocks=200)
    _add(engine, *(_seq(2, 400, flow="light") for _ in range(30)))
    _add(engine, *(_seq(2, 400, flow="heavy", share=Share(weight=3.0)) for _ in range(8)))
    _run(engine, 600)
    rows = _served(runner)
    assert rows["heavy"] / rows["light"] == pytest.approx(3.0, rel=0.15)


def test_a_model_that_asks_once_does_not_wait_for_endless_streams() -> None:
    """A first request of a queue has its first token within two steps, beside forty long streams."""
    engine, _, _ = _engine(max_seqs=32, max_tokens=64, blocks=2000)
    _add(engine, *(_seq(2, 2000, flow="endless") for _ in range(40)))
    _run(engine, 50)
    query = _seq(8, 4, flow="once")
    engine.add(query)
    assert _steps(engine, query, 20, first=True) <= 2


def test_of_all_rows_few_are_computed_twice_for_new_ones() -> None:
    """Models that ask once preempt an endless stream, each time at its cost, until the credit is used up."""
    engine, runner, _ = _engine(max_seqs=1, blocks=4000)
    _add(engine, _seq(2, 8000, flow="endless"))
    _run(engine, 3000)  # credit has a bound
    runner.batches.clear()
    for number in range(2000):
        if number % 3 == 0:
            engine.add(_seq(2, 1, flow=f"once {number}"))
        engine.step()
    rows = sum(chunk.length for batch in runner.batches for chunk in batch.chunks)
    assert QUANTUM_TOKENS < runner.again <= rows * MAX_RECOMPUTED_SHARE + QUANTUM_TOKENS


def test_few_take_seats_of_others_in_a_step() -> None:
    """Two of many that wait for seats may ask in a step: one on adapters under way, and one on others."""
    engine, _, _ = _engine(max_seqs=8, max_adapters=9, max_tokens=64, blocks=2000)
    engine._scheduler._credit = -math.inf  # nobody comes first because it is new
    _add(engine, *(_seq(2, 200, flow="ahead") for _ in range(8)))
    engine.step()
    _add(engine, *(_seq(2, 200, max(0, number), flow=f"{number}") for number in range(-3, 5)))
    preempted = [engine.stats.preemptions for _ in range(40) if engine.step() is not None]
    assert preempted[-1] == 8
    assert max(after - before for before, after in itertools.pairwise(preempted)) == 2


def test_a_queue_runs_at_most_its_share() -> None:
    """max_running holds over all adapters of a flow, and leaves the seats to others."""
    engine, runner, _ = _engine(max_seqs=4, max_adapters=4)
    for uid in (1, 2, 1, 2):
        engine.add(_seq(2, 5, uid=uid, flow="bounded", share=Share(max_running=1)))
    engine.add(_seq(2, 5, flow="free"))
    _drain(engine)
    for batch in runner.batches:
        assert sum(chunk.seq.flow == "bounded" for chunk in batch.chunks) <= 1
    assert {chunk.seq.flow for chunk in runner.batches[0].chunks} == {"bounded", "free"}


def test_the_newest_share_of_a_queue_counts() -> None:
    """The share of a queue's newest sequence bounds all of them."""
    engine, runner, _ = _engine()
    _add(engine, *(_seq(2, 5, share=Share(max_running=most)) for most in (1, 1, 3)))
    engine.step()
    assert len(runner.batches[0].chunks) == 3


def test_counters_begin_where_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that comes back is as far ahead as it was; those that are gone do not count."""
    monkeypatch.setattr(queues, "MAX_IDLE_COUNTERS", 4)
    every = SequenceQueues()

    def served(flow: str, rows: int = 0, **fields: Any) -> tuple[Sequence, float]:
        seq = _seq(2, 1, flow=flow, **fields)
        queue = every.add(seq)
        began = queue.served
        every.charge(queue, rows)
        every.changed()
        return seq, began

    low, _ = served("low")
    gone = [served(f"flow {rows}", rows)[0] for rows in range(1, 6)]
    for seq in gone:
        every.remove(seq)
    assert [served(f"flow {rows}")[1] for rows in (1, 5)] == [0.0, 5.0]
    assert served("behind", share=Share(background=True))[1] == FIRST_BACKGROUND_COUNTER
    high = every.of[served("high", 9)[0]]
    for seq in [seq for queue in every for seq in queue.waiting if queue.flow not in ("low", "high")]:
        every.remove(seq)
    for counted in (False, True):
        every.count(high, counted=counted)
    every.remove(low)
    last, began = served("last")
    assert began == 9.0
    every.charge(high, 1)
    for seq in (*high.waiting, last):
        every.remove(seq)
    assert served("high")[1] == 0.0


def test_a_queue_at_its_share_delays_no_other() -> None:
    """The model that was served least makes room for itself, also when another is at its share."""
    engine, _, _ = _engine(max_seqs=4, max_tokens=16, blocks=2000)
    _add(engine, *(_seq(2, 1500, flow="endless") for _ in range(3)))
    _add(engine, *(_seq(2, 1500, flow="bounded", share=Share(weight=50.0, max_running=1)) for _ in range(2)))
    _run(engine, 20)
    query = _seq(2, 2, flow="once")
    engine.add(query)
    assert _steps(engine, query, 300, first=True)


def test_who_was_away_has_saved_nothing_and_owes_nothing() -> None:
    """A model that comes back starts level with the others, without credit or debt."""
    engine, runner, _ = _engine(max_seqs=2, blocks=400)
    _add(engine, *(_seq(2, 1000, flow="steady") for _ in range(3)))
    _run(engine, 200)
    _add(engine, *(_seq(2, 1000, flow="back") for _ in range(3)))
    runner.batches.clear()
    _run(engine, 600)
    rows = _served(runner)
    assert rows["back"] / rows["steady"] == pytest.approx(1.0, rel=0.25)


def test_a_model_far_behind_takes_a_seat_at_once() -> None:
    """A model that was served far less takes a seat within two steps, though the other was the last to wait."""
    engine, _, _ = _engine(max_seqs=2, max_tokens=64, blocks=2000)
    _add(engine, _seq(2, 2000, flow="behind"), _seq(500, 1, flow="ahead"))
    _run(engine, 30)
    engine.add(_seq(2, 2000, flow="ahead"))
    engine.step()
    query = _seq(2, 2, flow="behind")
    engine.add(query)
    assert _steps(engine, query, 300, first=True) <= 2


def test_a_blend_keeps_free_places_from_those_behind_it() -> None:
    """A blend that waits for places is not overtaken by a sequence behind it."""
    engine, _, _ = _engine()
    engine.add(_seq(2, 50, 1))
    engine.step()
    blend, behind = _seq(2, 5, BLENDS + 1), _seq(2, 5, 4)
    _add(engine, blend, behind)
    while not blend.num_known:
        engine.step()
        assert blend.num_known or not behind.num_known


def test_a_blend_takes_no_place_of_its_own_adapters() -> None:
    """The stream that is furthest ahead has one of its adapters, and goes on; the other one makes room."""
    engine, runner, _ = _engine()
    _add(engine, _seq(9, 300, 2), _seq(2, 300, 4))
    _run(engine, 20)
    blend = _seq(2, 5, BLENDS + 1)
    engine.add(blend)
    assert _steps(engine, blend, 20)
    for batch in runner.batches:
        assert len({adapter for chunk in batch.chunks for adapter in chunk.seq.adapters}) <= 2


class Costly(StepTimes):
    """Says that a second sequence would lengthen a step too much, unless nobody else is there."""

    def spare_s(self, decodes: int) -> float:  # noqa: ARG002 - as the real one
        return 0.0

    def beside(self, decodes: int, spare_s: float) -> int:  # noqa: ARG002 - as the real one
        return 0 if decodes else 100

    def cost_s(self, context: int, rows: int) -> float:
        return 0.1 * (context + rows)

    def may_part(self, decodes: int) -> bool:  # noqa: ARG002 - as the real one
        return False


class Roomy(StepTimes):
    """Says that any number of the background has room in a step."""

    def beside(self, decodes: int, spare_s: float) -> int:  # noqa: ARG002 - as the real one
        return 100


BEHIND = {"share": Share(background=True), "flow": "background"}


@pytest.mark.parametrize(("uid", "seats"), [(0, 2), (2, 2), (0, 9)])
def test_the_background_steps_back_at_once(uid: int, seats: int) -> None:
    """A request gets a seat, a place of an adapter and steps of its own; the background goes on behind it."""
    engine, runner, _ = _engine(max_seqs=seats, max_adapters=1, step_times=Costly())
    behind = [_seq(4, 40, 1, **BEHIND) for _ in range(4)]
    _add(engine, *behind[1:])
    _run(engine, 5)
    request = _seq(4, 8, uid)
    _add(engine, request, behind[0])
    before = len(runner.batches)
    assert _steps(engine, request, 8) == 8
    assert all([chunk.seq for chunk in batch.chunks] == [request] for batch in runner.batches[before:])
    assert set(_drain(engine)) == {seq.id for seq in behind}


def test_the_background_takes_no_row_of_others() -> None:
    """A step with fewer rows than sequences that decode leaves out the background."""
    engine, _, _ = _engine(max_tokens=3, step_times=Roomy())
    _add(engine, *(_seq(2, 40, **BEHIND) for _ in range(3)))
    _run(engine, 6)
    request = _seq(2, 8)
    _add(engine, request)
    assert _steps(engine, request, 8) == 8


def test_the_background_has_what_a_step_leaves() -> None:
    """The background takes part in a step that it does not lengthen, also with prompts that come later."""
    engine, _, _ = _engine(max_seqs=4)
    request = _seq(4, 30)
    _add(engine, request, *(_seq(4, 5, **BEHIND) for _ in range(6)))
    ended = [output.seq_id for _ in range(30) for output in engine.step() if output.finish]
    assert ended[-1] == request.id
    assert len(ended) == 7
