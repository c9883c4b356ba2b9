"""Which tokens of which sequences the next step computes. No tensors here."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from inference_service.core.batch import Batch, Chunk
from inference_service.core.sequence import Adapter, Sequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.lanes import Lane, Lanes, Rank, order, take
from inference_service.engine.lookup import Lookup
from inference_service.engine.residents import Presence, Residents
from inference_service.engine.sampler import shapes

QUANTUM: Final = 128.0
"""Tokens, by weight, that a lane under way is ahead of one that finds no place before it makes room for it.
With less, sequences would be computed again too often; with more, the others would wait longer."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of one step."""

    max_tokens: int
    """Rows of a forward pass."""
    max_seqs: int
    """Sequences that are under way at once."""
    max_adapters: int
    """Distinct adapters among them."""
    max_seq_len: int
    """Tokens of a sequence, prompt and answer together."""
    watermark: float = 0.01
    """Part of the blocks that admission leaves free, for the growth of those under way."""
    speculative_tokens: int = 0
    """Tokens that are drafted for a step that has no other rows than one; with more rows fewer. 0: none."""

    def reached(self, seq: Sequence, length: int) -> bool:
        """True when a sequence ends by its limit at so many tokens of prompt and answer."""
        return length - seq.num_prompt >= seq.sampling.max_tokens or length >= self.max_seq_len


class _Outcome(Enum):
    """Of an attempt to admit the first of a lane."""

    ADMITTED = "admitted"
    PASSED = "passed"
    """Not now, but others may."""
    BLOCKED = "blocked"
    """Not now, and nobody behind it."""


@dataclass
class _Step:
    """A step while it is put together."""

    budget: int
    lengths: dict[Sequence, int] = field(default_factory=dict)
    preempted: set[Sequence] = field(default_factory=set)
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    short: bool = False
    """Whether those under way lacked blocks, so that nobody new may take some."""
    ahead: dict[Lane, float] = field(default_factory=dict)
    """What lanes are given in this step, which they are charged for when it was submitted."""

    def counter(self, lane: Lane) -> float:
        """What a lane was served, this step included."""
        return lane.served + self.ahead.get(lane, 0.0)

    def give(self, lane: Lane, seq: Sequence, rows: int) -> None:
        """Let a step have rows of a sequence."""
        self.lengths[seq] = rows
        self.budget -= rows
        self.ahead[lane] = self.ahead.get(lane, 0.0) + rows / lane.share.weight


_Turn = tuple[float, int, tuple[int, int], int, Lane, Sequence | None]
"""Counter, those under way first, order, a tie-breaker; and a prompt under way, or None for who waits next."""


class Scheduler:
    """Mixes decode and prefill under one token budget.

    Sequences that decode come first. Then prompts under way and those that wait take turns by `Lanes`: the
    lane that was served least comes first, and within a lane the most urgent, then the oldest. A lane lets
    others pass while its adapter is not resident, or finds no place among the `max_adapters` of a step.

    Whoever finds no seat, no blocks, no place among the adapters or none in the bank is served nothing, while
    those under way are. So the difference grows, and from a QUANTUM on they make room: the lane that is
    furthest ahead gives up its least urgent sequence, whose tokens are kept and whose blocks may be found
    again. That nobody starves follows from this and from nothing else.

    A token in flight counts as a token: its sequence is scheduled again before it is known, unless it is the
    last one. A preempted sequence waits until what it has in flight is known.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, residents: Residents) -> None:
        self.limits = limits
        self.blocks = blocks
        self.lanes = Lanes()
        self.running: list[Sequence] = []
        """Most urgent first, then oldest."""
        self.num_waiting = 0
        self.preemptions = 0
        self.lookup = Lookup()
        self._residents = residents
        self._seen = -1
        self._starved: list[Lane] = []
        self._watermark = max(1, int(limits.watermark * blocks.num_blocks))
        self._numbers = itertools.count()

    @property
    def waiting(self) -> list[Sequence]:
        """Those that wait, lane by lane; may be asked on another thread."""
        return [seq for lane in self.lanes for seq in tuple(lane.waiting)]

    @property
    def may_begin(self) -> bool:
        """Whether somebody waits whose adapter is in the bank."""
        return any(lane.adapter is None or lane.adapter.slot is not None for lane in self.lanes.waiting)

    def waiting_for(self, adapter: Adapter) -> list[Sequence]:
        """Return those that wait for an adapter."""
        return [seq for lane in self.lanes if lane.adapter is adapter for seq in lane.waiting]

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait; its adapter is wanted from now on."""
        self.lanes.add(seq)
        self._waits(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if take(self.running, seq):
            self._let_go(seq)
        else:
            self._waits_no_more(seq)
        self.lanes.remove(seq)

    def schedule(self) -> Batch:
        """Choose the chunks of the next step; empty when there is nothing to do."""
        step = _Step(self.limits.max_tokens)
        bound = self._bring_in(step)
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self.running:
            (prompts if seq.num_pending > 1 else decodes).append(seq)
        if len(decodes) > step.budget:
            decodes.sort(key=lambda seq: self.lanes.of(seq).served)
        for seq in decodes:
            self._continue(seq, step)
        self._take_turns(step, prompts, bound)
        if self.limits.speculative_tokens:
            self._draft(step)
        drafts = step.drafts
        return Batch(
            tuple([Chunk(seq, length, len(drafts.get(seq, ()))) for seq, length in step.lengths.items()]),
            drafts,
        )

    def commit(self, batch: Batch) -> None:
        """Note that a batch was submitted: for every later step, its keys and values are in the cache."""
        for chunk in batch.chunks:
            seq, drawn = chunk.seq, chunk.samples
            seq.num_computed += chunk.length - chunk.drafted
            seq.in_flight += drawn
            rows = seq.num_computed - seq.num_charged
            if rows > 0:  # what is computed again costs nothing, nor does what was cached
                seq.lane.served += min(rows, chunk.length) / seq.lane.share.weight
                seq.num_charged = seq.num_computed
            self.blocks.register(seq)

    def accept(self, seq: Sequence) -> None:
        """Note that one more token of a draft held: it was computed, and the one behind it was drawn."""
        seq.num_computed += 1
        seq.num_charged += 1
        seq.in_flight += 1
        seq.lane.served += 1 / seq.lane.share.weight

    def _draft(self, step: _Step) -> None:
        """Fill a small step with drafts of those that decode; they take nobody's rows or blocks."""
        rows = sum(step.lengths.values())
        room = min(self.limits.speculative_tokens + 1 - rows, self.limits.max_seqs - rows, step.budget)
        for seq in self.running if room > 0 and not step.short else ():
            if (
                step.lengths.get(seq) != 1
                or seq.num_pending != 1
                or seq.in_flight
                or shapes(seq, seq.num_known)
            ):
                continue
            left = min(seq.sampling.max_tokens - seq.num_known, self.limits.max_seq_len - len(seq.tokens)) - 1
            most = min(room, left)
            draft = self.lookup.draft(seq, most) if most > 0 else []
            reach = len(seq.tokens) + len(draft)
            needed = self.blocks.blocks_for(reach) - len(seq.blocks)
            if draft and needed + self._watermark <= self.blocks.num_free and self.blocks.grow(seq, reach):
                step.drafts[seq] = draft
                step.lengths[seq] += len(draft)
                room -= len(draft)

    def _bring_in(self, step: _Step) -> float:
        """Let adapters arrive in the order of those who wait for them.

        Returns the counter from which on nobody begins on an adapter, since somebody waits for a place in the
        bank that those who are so far ahead are to leave.
        """
        if self._residents.wanting or self._residents.changes != self._seen:
            self._look_for_adapters()
        starved = [lane for lane in self._starved if lane.waiting and self._presence(lane) is Presence.STARVED]
        if not starved:
            return math.inf
        first = min(starved, key=lambda lane: lane.rank)
        furthest = self._furthest(first, step, lambda lane: lane.adapter is not None)
        if furthest is not None and not self._residents.releasing:
            self._displace(furthest.adapter, step)
        return first.served + QUANTUM

    def _look_for_adapters(self) -> None:
        """Say who waits for which adapter, and note who can be served now."""
        waiting = [(lane, lane.adapter) for lane in self.lanes.waiting if lane.adapter is not None]
        ranks: dict[Adapter, Rank] = {}
        for lane, adapter in waiting:
            ranks[adapter] = min(ranks.get(adapter, lane.rank), lane.rank)
        self._residents.bring_in(ranks)
        self._starved = []
        for lane, _ in waiting:
            presence = self._presence(lane)
            self.lanes.count(lane, counted=presence is not Presence.ABSENT)
            if presence is Presence.STARVED:
                self._starved.append(lane)
        self._seen = self._residents.changes

    def _presence(self, lane: Lane) -> Presence:
        return Presence.RESIDENT if lane.adapter is None else self._residents.presence(lane.adapter)

    def _take_turns(self, step: _Step, prompts: list[Sequence], bound: float) -> None:
        """Share what is left of the budget among prompts under way and those that wait."""
        turns: list[_Turn] = []
        for seq in prompts:
            lane = self.lanes.of(seq)
            turns.append((lane.served, 0, seq.order, next(self._numbers), lane, seq))
        turns += [self._turn(lane, step) for lane in self._candidates(bound)]
        heapq.heapify(turns)
        while turns and step.budget:
            *_, lane, prompt = heapq.heappop(turns)
            if prompt is not None:
                self._continue(prompt, step)
                continue
            outcome = _Outcome.BLOCKED if step.short else self._admit(lane, step)
            if outcome is _Outcome.BLOCKED:
                turns = [turn for turn in turns if turn[-1] is not None]
                heapq.heapify(turns)
            elif outcome is _Outcome.ADMITTED and lane.waiting:
                heapq.heappush(turns, self._turn(lane, step))

    def _turn(self, lane: Lane, step: _Step) -> _Turn:
        return step.counter(lane), 1, lane.waiting[0].order, next(self._numbers), lane, None

    def _candidates(self, bound: float) -> list[Lane]:
        """Lanes of which one may be admitted.

        Where seats or places of adapters are short, of those who lack one only the first may ask, and only when
        somebody is far enough ahead: a step does not walk through a thousand who wait.
        """
        if not self.num_waiting:
            return []
        seated = len(self.running) < self.limits.max_seqs
        active = self._active()
        if seated and len(active) < self.limits.max_adapters:
            return self._ready(bound)
        joining = self.lanes.waiting_for([None, *active]) if seated else []
        joining = [lane for lane in joining if self._may_begin(lane, bound)]
        if math.isinf(self.lanes.lowest):
            return joining
        most = max([self.lanes.of(seq).served for seq in self.running], default=0.0)
        if most - self.lanes.lowest < QUANTUM:
            return joining
        others = [lane for lane in self._ready(bound) if lane not in joining]
        return [*joining, min(others, key=lambda lane: lane.rank)] if others else joining

    def _ready(self, bound: float) -> list[Lane]:
        return [lane for lane in self.lanes.look_through() if self._may_begin(lane, bound)]

    def _may_begin(self, lane: Lane, bound: float) -> bool:
        """Whether nothing that only the lane itself can change is in its way."""
        if lane.waiting[0].in_flight or self.lanes.is_full(lane):
            return False
        return lane.adapter is None or (lane.adapter.slot is not None and lane.served < bound)

    def _active(self) -> set[Adapter]:
        return {seq.adapter for seq in self.running if seq.adapter is not None}

    def _continue(self, seq: Sequence, step: _Step) -> None:
        """Give a sequence under way its rows; who is furthest ahead gives up the blocks that it lacks."""
        if seq in step.preempted or not step.budget or (seq.in_flight and self._waits_for_its_token(seq)):
            return
        step.lengths[seq] = length = min(seq.num_pending, step.budget)
        step.budget -= length
        while seq not in step.preempted and not self.blocks.grow(seq, seq.num_computed + length):
            step.short = True
            self._preempt(max(self.running, key=self._expendable), step)

    def _expendable(self, seq: Sequence) -> tuple[float, tuple[int, int]]:
        """Grows with how far the lane is ahead, and within it with how little urgent a sequence is."""
        return self.lanes.of(seq).served, seq.order

    def _waits_for_its_token(self, seq: Sequence) -> bool:
        return self.limits.reached(seq, seq.length)

    def _admit(self, lane: Lane, step: _Step) -> _Outcome:
        """Begin with the first of a lane, if everything that it needs is there or is made room for."""
        seq = lane.waiting[0]
        if seq in step.preempted or self.lanes.is_full(lane) or not self._finds_place(lane, step):
            return _Outcome.PASSED
        while len(self.running) >= self.limits.max_seqs:
            if not self._make_room(lane, step):
                return _Outcome.BLOCKED
        while not self._start(seq):
            if not self._make_room(lane, step):
                return _Outcome.BLOCKED
        self._waits_no_more(seq)
        self.lanes.start(seq)
        bisect.insort(self.running, seq, key=order)
        if seq.adapter is not None:
            self._residents.acquire(seq.adapter)
        step.give(lane, seq, min(seq.num_pending, step.budget))
        return _Outcome.ADMITTED

    def _finds_place(self, lane: Lane, step: _Step) -> bool:
        """Whether its adapter may take part, if need be in the place of one that is far ahead."""
        active = self._active()
        if lane.adapter is None or lane.adapter in active or len(active) < self.limits.max_adapters:
            return True
        furthest = self._furthest(lane, step, lambda other: other.adapter is not None)
        if furthest is not None:
            self._displace(furthest.adapter, step)
        return furthest is not None

    def _make_room(self, lane: Lane, step: _Step) -> bool:
        """Preempt one sequence of the lane that is furthest ahead of this one, if any is far enough."""
        furthest = self._furthest(lane, step, lambda _: True)
        if furthest is not None:
            self._preempt(furthest.running[-1], step)
        return furthest is not None

    def _furthest(self, lane: Lane, step: _Step, may: Callable[[Lane], bool]) -> Lane | None:
        """The lane under way that is furthest ahead of another, by a QUANTUM at least; None if none is."""
        under_way = {self.lanes.of(seq) for seq in self.running} - {lane}
        furthest = max(filter(may, under_way), key=lambda each: each.served, default=None)
        if furthest is None or furthest.served - step.counter(lane) < QUANTUM:
            return None
        return furthest

    def _displace(self, adapter: Adapter | None, step: _Step) -> None:
        """Preempt all that are under way on an adapter."""
        for seq in [seq for seq in self.running if seq.adapter is adapter]:
            self._preempt(seq, step)

    def _preempt(self, seq: Sequence, step: _Step) -> None:
        """Let a sequence under way wait again, also if the step has rows of it already."""
        step.preempted.add(seq)
        rows = step.lengths.pop(seq, 0)
        step.budget += rows
        take(self.running, seq)
        self._let_go(seq)
        self.lanes.stop(seq)
        self._waits(seq)
        self.preemptions += 1

    def _start(self, seq: Sequence) -> bool:
        """Give a sequence blocks for its whole context; False, with nothing changed, when it does not fit."""
        if self.blocks.still_refused(seq):
            return False
        self.blocks.admit(seq)
        needed = self.blocks.blocks_for(len(seq.tokens)) - len(seq.blocks)
        reserve = self._watermark if self.running else 0
        if needed + reserve > self.blocks.num_free:
            self.blocks.refuse(seq)
            return False
        self.blocks.grow(seq, len(seq.tokens))
        self.blocks.count(seq)
        if not seq.num_generated:
            seq.num_cached = seq.num_computed
        return True

    def _waits(self, seq: Sequence) -> None:
        self.num_waiting += 1
        if seq.adapter is not None:
            self._residents.want(seq.adapter)

    def _waits_no_more(self, seq: Sequence) -> None:
        self.num_waiting -= 1
        if seq.adapter is not None:
            self._residents.unwant(seq.adapter)

    def _let_go(self, seq: Sequence) -> None:
        self.blocks.release(seq)
        if seq.adapter is not None:
            self._residents.release(seq.adapter)
