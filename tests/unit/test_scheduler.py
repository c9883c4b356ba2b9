"""Scheduling: budgets, fairness, preemption. No model: a step gives every sampled sequence one token."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_service.core.batch import Batch
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Adapter, FinishReason, Sequence, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.scheduler import Scheduler, SchedulerLimits
from inference_service.engine.step import Pending

_ids = itertools.count()


class FakeRunner:
    """Answers with a fixed token and keeps the batches."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.batches: list[Batch] = []

    def submit(self, batch: Batch) -> Pending:
        """Note a batch; every chunk's blocks must cover its context."""
        for chunk in batch.chunks:
            assert len(chunk.seq.blocks) * 4 >= chunk.end
        self.batches.append(batch)
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        return Pending(seqs, lambda: [Token(7)] * len(seqs))


def _engine(
    *, blocks: int = 64, max_tokens: int = 16, max_seqs: int = 4, max_adapters: int = 2, depth: int = 0
) -> tuple[Engine, FakeRunner, BlockManager]:
    manager = BlockManager(blocks, 4)
    runner = FakeRunner(depth)
    limits = SchedulerLimits(max_tokens, max_seqs, max_adapters, max_seq_len=blocks * 4)
    return Engine(runner, limits, manager, clock=lambda: 0.0), runner, manager


def _seq(prompt: int, new: int, uid: int = 0, priority: int = 0, deadline_s: float | None = None) -> Sequence:
    number = next(_ids)
    adapter = Adapter(f"a{uid}", uid - 1) if uid else None
    tokens = [number * 1000 + index for index in range(prompt)]  # no shared prefixes by accident
    return Sequence(
        str(number), tokens, SamplingParams(max_tokens=new), adapter, priority, deadline_s=deadline_s
    )


def _drain(engine: Engine, steps: int = 3000) -> dict[str, FinishReason]:
    ends: dict[str, FinishReason] = {}
    for _ in range(steps):
        if engine.idle:
            return ends
        for output in engine.step():
            if output.finish:
                assert output.seq_id not in ends
                ends[output.seq_id] = output.finish
    raise AssertionError("the engine did not come to an end")


def test_decodes_come_before_a_long_prompt_and_share_its_step() -> None:
    """A long prompt is cut to what the budget leaves beside those that decode."""
    engine, runner, _ = _engine(max_tokens=8)
    short, long = _seq(3, 20), _seq(20, 1)
    engine.add(short)
    engine.step()
    engine.add(long)
    engine.step()
    lengths = {chunk.seq.id: chunk.length for chunk in runner.batches[-1].chunks}
    assert lengths == {short.id: 1, long.id: 7}


def test_a_higher_priority_is_admitted_first() -> None:
    """Of those that wait, the most urgent enters first, then the oldest."""
    engine, runner, _ = _engine(max_seqs=1)
    seqs = [_seq(2, 1), _seq(2, 1), _seq(2, 1, priority=5)]
    for seq in seqs:
        engine.add(seq)
    _drain(engine)
    order = [batch.chunks[0].seq.id for batch in runner.batches]
    assert order == [seqs[2].id, seqs[0].id, seqs[1].id]


def test_an_adapter_without_a_place_lets_others_pass_but_does_not_starve() -> None:
    """One request of a third adapter gets in although two adapters keep the places busy without end."""
    engine, _, _ = _engine(max_adapters=2, max_seqs=4)
    waiting = _seq(2, 3, uid=3)
    ends: set[str] = set()
    for uid in (1, 2, 1, 2):
        engine.add(_seq(2, 6, uid=uid))
    engine.step()
    engine.add(waiting)
    for step in range(200):
        engine.add(_seq(2, 6, uid=1 + step % 2))
        ends |= {output.seq_id for output in engine.step() if output.finish}
        if waiting.id in ends:
            return
    pytest.fail("the third adapter starved")


def test_base_requests_pass_an_adapter_that_waits() -> None:
    """A request of the base is admitted although an older one waits for an adapter's place."""
    engine, runner, _ = _engine(max_adapters=1, max_seqs=4)
    engine.add(_seq(2, 30, uid=1))
    engine.add(_seq(2, 1, uid=2))
    base = _seq(2, 1)
    engine.add(base)
    engine.step()
    assert base.id in {chunk.seq.id for chunk in runner.batches[0].chunks}


def test_a_late_sequence_ends_with_its_deadline() -> None:
    """A sequence whose deadline has passed is freed and says so, also while it waits."""
    engine, _, blocks = _engine()
    late = _seq(2, 5, deadline_s=-1.0)
    engine.add(late)
    outputs = engine.step()
    assert [(output.seq_id, output.finish) for output in outputs] == [(late.id, FinishReason.DEADLINE)]
    assert engine.idle
    assert blocks.num_free == blocks.num_blocks


def test_preemption_keeps_every_request() -> None:
    """With too few blocks for all, some are preempted and all come to their end."""
    engine, _, blocks = _engine(blocks=8, max_seqs=4)
    seqs = [_seq(6, 14) for _ in range(4)]
    for seq in seqs:
        engine.add(seq)
    ends = _drain(engine)
    assert set(ends) == {seq.id for seq in seqs}
    assert engine.stats.preemptions > 0
    assert all(seq.num_generated == 14 for seq in seqs)
    assert blocks.num_free == blocks.num_blocks


REQUEST = st.tuples(
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(0, 4),
    st.integers(0, 2),
    st.sampled_from([None, None, None, -1.0]),
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.one_of(REQUEST, st.just("step"), st.just("abort")), min_size=1, max_size=40), st.integers(8, 30)
)
def test_budgets_hold_and_every_request_ends_once(actions: list[object], num_blocks: int) -> None:
    """Whatever comes, goes, expires or is preempted: no bound is exceeded, a request that is not aborted ends
    exactly once, and all blocks come back."""
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
            seq = _seq(min(prompt, num_blocks * 4 - new), new, uid, priority, deadline)
            added[seq.id] = seq
            engine.add(seq)
    ends += list(_drain(engine))
    assert sorted(ends) == sorted(set(added) - aborted)
    assert blocks.num_free == blocks.num_blocks
    for batch in runner.batches:
        assert batch.num_tokens <= 16
        assert len(batch.chunks) <= 4
        assert len({chunk.seq.adapter_uid for chunk in batch.chunks} - {0}) <= 2
        assert len({chunk.seq.id for chunk in batch.chunks}) == len(batch.chunks)


def _admissible(scheduler: Scheduler, passed: Counter[str]) -> list[str]:
    """Who is admitted where neither blocks nor rows are short, by one walk; passed counts who was passed by."""
    limits, running = scheduler.limits, [seq.adapter_uid for seq in scheduler.running]
    admitted: list[str] = []
    blocked: Sequence | None = None
    for seq in scheduler.waiting:
        if len(running) == limits.max_seqs:
            break
        uid, joined = seq.adapter_uid, set(running) - {0}
        if blocked is None:
            fits = not uid or uid in joined or len(joined) < limits.max_adapters
        else:
            fits = not uid or (uid in joined and passed[blocked.id] < limits.max_seqs)
            passed[blocked.id] += fits and uid != 0
        if fits:
            running.append(uid)
            admitted.append(seq.id)
        else:
            blocked = blocked or seq
    return admitted


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 1), st.sampled_from([1, 2, 20])), min_size=8, max_size=40
    ),
    st.integers(2, 5),
    st.integers(1, 2),
)
def test_the_queue_admits_whom_a_walk_through_it_finds(
    requests: list[tuple[int, int, int]], max_seqs: int, max_adapters: int
) -> None:
    """Priority, then arrival; an adapter without a place is passed by, but only so often: step after step the
    queues by adapter give those, in that order, whom one look at each sequence would."""
    blocks = BlockManager(1000, 4)
    scheduler = Scheduler(SchedulerLimits(1000, max_seqs, max_adapters, max_seq_len=64), blocks)
    lifetimes: dict[str, int] = {}
    passed: Counter[str] = Counter()
    for arrival, (uid, priority, lifetime) in enumerate(requests):
        seq = _seq(3, 9, uid, priority)
        seq.arrival, lifetimes[seq.id] = arrival, lifetime
        scheduler.add(seq)
    while scheduler.waiting or scheduler.running:
        expected = _admissible(scheduler, passed)
        before = {seq.id for seq in scheduler.running}
        batch = scheduler.schedule()
        assert [chunk.seq.id for chunk in batch.chunks if chunk.seq.id not in before] == expected
        assert scheduler.running == sorted(scheduler.running, key=lambda seq: seq.order)
        scheduler.commit(batch)
        for seq in tuple(scheduler.running):
            seq.tokens.append(1)
            seq.in_flight -= 1
            lifetimes[seq.id] -= 1
            if not lifetimes[seq.id]:
                scheduler.remove(seq)
    assert blocks.num_free == blocks.num_blocks
