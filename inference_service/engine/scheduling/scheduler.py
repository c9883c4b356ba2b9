"""The choice of the tokens and sequences of the next step. No tensors here."""

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Final

from inference_service.core.adapter import Adapter
from inference_service.core.sequence import Batch, Sequence
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.lookup import Lookup
from inference_service.engine.scheduling.queues import (
    Plan,
    Rank,
    SchedulerLimits,
    SequenceQueue,
    SequenceQueues,
    order,
    take,
)
from inference_service.engine.scheduling.residents import Presence, Residents
from inference_service.engine.scheduling.step_times import EMPTY_LOAD, MIN_CHUNK_ROWS, StepTimes

QUANTUM_TOKENS: Final = 128.0
"""Tokens, by weight, that a queue under way is ahead of one that finds no place before it makes room for it.

With less, sequences would be computed again too often; with more, the others would wait longer.
"""
FIRST_QUANTUM_TOKENS: Final = 4.0
"""The same for a place among the adapters where a queue is new, while there is credit for it.

For a seat it need not wait at all: its first token costs one preemption.
"""
MAX_RECOMPUTED_SHARE: Final = 1 / 8
"""Share of all computed rows that may be computed twice for new queues, QUANTUM_TOKENS of them at once."""
SHORTER_PROMPTS_SHARE: Final = 0.75
"""Part that a prompt which would take all that is left of a step leaves to shorter ones of its queue."""
MAX_WHOLE_STEP_S: Final = 0.1
"""Largest time of a step of whole prompts, but for one that takes longer alone: their rows cost the same from
some hundred on, and a later request waits for the end of the step."""
FAR_SHORTER: Final = 4.0
"""Ratio of lengths from which on a prompt does not wait for a longer one, where steps pause."""
MAX_AHEAD_TOKENS: Final = 2048.0
"""Tokens, by weight, that a queue is ahead of another's whole prompt from which on none of it passes that."""


class _Outcome(Enum):
    """The result of an attempt to admit the first of a queue."""

    ADMITTED = "admitted"
    PASSED = "passed"
    """Not now, but others may."""
    BLOCKED = "blocked"
    """Not now, and nobody behind it."""


_Turn = tuple[float, int, tuple[int, int], int, SequenceQueue, Sequence | None]
"""Counter, those under way first, order, a tie-breaker; and a prompt under way, or None for who waits next."""


class Scheduler:
    """Mixes decode and prefill under one token budget.

    Sequences that decode come first. Then prompts under way and waiting ones take turns by `SequenceQueues`, in
    the time that `StepTimes` leaves them: the queue that was served least comes first, and within a queue the
    most urgent, then the oldest, which leaves most of what it would take to shorter ones of its queue; one that
    must be computed whole leaves a step before its own to shorter ones of all queues. A queue lets others pass
    while an adapter of it is not resident, or finds no place among the `max_adapters` of a step.

    A sequence without a seat, blocks, a place among the adapters or in the bank is served nothing, while those
    under way are. So the difference grows, and from QUANTUM_TOKENS on they make room: the queue that is
    furthest ahead gives up its least urgent sequence, whose tokens are kept and whose blocks may be found
    again. That no sequence starves follows from this and from nothing else. New ones wait for less than
    QUANTUM_TOKENS, as long as few rows are computed twice.

    A token in flight counts as a token: its sequence is scheduled again before it is known, unless it is the
    last one. A preempted sequence waits until its tokens in flight are known.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        residents: Residents,
        lookup: Lookup | None = None,
        step_times: StepTimes | None = None,
    ) -> None:
        """Schedule within limits; lookup and step_times are None for those that know nothing yet."""
        self.limits = limits
        self.blocks = blocks
        self.queues = SequenceQueues()
        self.running: list[Sequence] = []
        """Most urgent first, then oldest."""
        self.num_waiting = 0
        self.preemptions = 0
        self.lookup = Lookup() if lookup is None else lookup
        self.step_times = step_times or StepTimes(prefill_first=limits.prefill_first)
        self._load = EMPTY_LOAD
        self._last = Batch(())
        self._parted = False
        """True if the last step left out those that decode."""
        self._passed: set[Sequence] = set()
        """Prompts that must be computed whole, and had no rows of a step: they let no others pass again."""
        self._residents = residents
        self._credit = QUANTUM_TOKENS
        """Rows that may be computed twice now; below 0 only those that are QUANTUM_TOKENS behind find room."""
        self._seen = -1
        self._bound = math.inf
        """The counter from which on no queue begins on an adapter."""
        self._starved: list[SequenceQueue] = []
        self._numbers = itertools.count()

    @property
    def waiting(self) -> list[Sequence]:
        """Return the waiting sequences, queue by queue; may be called on another thread."""
        return [seq for queue in self.queues for seq in tuple(queue.waiting)]

    @property
    def may_begin(self) -> bool:
        """Return True if a sequence that waits may begin, or an adapter may find its place by now."""
        return self._residents.changes != self._seen or any(map(self._may_use, self.queues.waiting))

    def waiting_for(self, adapters: Iterable[Adapter]) -> list[Sequence]:
        """Return those that wait for all of these adapters."""
        needed = set(adapters)
        return [seq for queue in self.queues if needed <= set(queue.adapters) for seq in queue.waiting]

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait; its adapter is wanted from now on."""
        seq.progress.end = self.limits.end(seq)
        self.queues.add(seq)
        self._waits(seq)

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence in any state, and free its resources."""
        if take(self.running, seq):
            self._let_go(seq)
        else:
            self._stop_waiting(seq)
        self._passed.discard(seq)
        self.queues.remove(seq)
        self.lookup.forget(seq)

    def schedule(self) -> Batch:
        """Choose the chunks of the next step; empty when there is nothing to do."""
        self.blocks.keep()
        plan = Plan(self.limits.max_tokens, self.step_times)
        self._bound = self._bring_in(plan)
        decodes: list[Sequence] = []
        for seq in self.running:
            progress = seq.progress
            one = len(progress.tokens) + progress.in_flight - progress.num_computed <= 1  # num_pending, inlined
            (decodes if one else plan.prompts).append(seq)
        behind = self._step_back(decodes, plan) if self.queues.in_background else []
        if len(decodes) > plan.budget:
            decodes.sort(key=lambda seq: self.queues.of[seq].served)
        self._decode(decodes, plan)
        self._prefill(plan)
        if behind and not plan.lengths:  # others cannot go on now
            self._decode([seq for seq in behind if seq.progress.num_pending <= 1], plan)
            plan.prompts += [seq for seq in behind if seq.progress.num_pending > 1]
            self._prefill(plan)
        self._parted = not self._parted and self._may_part(plan)
        if self._parted:
            for seq in decodes:
                plan.lengths.pop(seq, None)
        if self.limits.speculative_tokens and not plan.short:
            self._draft(plan)
        self._load = plan.load()
        self._last = plan.batch(self.blocks)
        return self._last

    @property
    def under_way(self) -> list[Sequence]:
        """Return the sequences of the last step, but for those between its parts, that have not ended."""
        return [chunk.seq for chunk in self._last.chunks if chunk.seq in self.queues.of]

    def schedule_between(self, spare_s: float) -> Batch:
        """Choose prompts that are far shorter than the longest of the last step, to run between its parts.

        They may pass it as they may pass what waits. The first may take longer than spare_s, which counts for
        the next call; so the step has half of the time. Often there are none.
        """
        plan = Plan(self.limits.max_tokens, self.step_times, MAX_WHOLE_STEP_S, admits_background=False)
        self._note_residents()
        if self.num_waiting and self.under_way and spare_s > 0:
            long = max(self.under_way, key=lambda seq: seq.num_prompt)
            shorter = self._shorter_of_all(long, plan, long.num_prompt / FAR_SHORTER)
            self._give_all(itertools.islice(shorter, 1), plan)
            plan.seconds -= MAX_WHOLE_STEP_S - spare_s
            self._give_all(shorter, plan)
        self._load = plan.load()
        return plan.batch(self.blocks)

    def _draft(self, plan: Plan) -> None:
        """Fill a step with drafts; beside others, sequences of the background have none."""
        drafting = self.running
        if plan.has_foreground:
            drafting = [seq for seq in drafting if not seq.share.background]
        self.lookup.fill(plan, drafting, self.limits, self.blocks)

    def _step_back(self, decodes: list[Sequence], plan: Plan) -> list[Sequence]:
        """Leave out of a step sequences of the background that would lengthen it for others; return them."""
        foreground = plan.has_foreground = self.queues.in_foreground
        others = sum(not seq.share.background for seq in decodes)
        plan.spare_s = self.step_times.spare_s(others) if foreground else math.inf
        waited_for = self.queues.foreground_waits or any(not seq.share.background for seq in plan.prompts)
        fits = self.step_times.cost_s(0, MIN_CHUNK_ROWS) <= plan.spare_s
        plan.admits_background = not foreground or (fits and not waited_for)
        most = 0 if foreground and not others else self.step_times.beside(others, plan.spare_s)
        behind = [seq for seq in decodes if seq.share.background][most:]
        if not plan.admits_background:
            behind += [seq for seq in plan.prompts if seq.share.background]
        left_out = set(behind)
        decodes[:] = [seq for seq in decodes if seq not in left_out]
        plan.prompts[:] = [seq for seq in plan.prompts if seq not in left_out]
        return behind

    def _prefill(self, plan: Plan) -> None:
        """Share what is left of a step among prompts; those of the background may lengthen it by little."""
        if not plan.prompts and not self.num_waiting:
            return
        plan.limit(len(plan.lengths))
        if self.limits.whole:
            plan.seconds = min(plan.seconds, MAX_WHOLE_STEP_S)
        if self.queues.in_background and plan.admits_background:
            plan.seconds = min(plan.seconds, plan.spare_s)
        self._take_turns(plan)

    def commit(self, batch: Batch, now_s: float) -> None:
        """Note that a batch was submitted: for every later step, its keys and values are in the cache."""
        self.step_times.submitted(self._load, now_s)
        self.queues.changed()
        computed, block_size = 0, self.blocks.block_size
        for chunk in batch.chunks:
            seq, known = chunk.seq, chunk.length - chunk.drafted
            progress = seq.progress
            computed += known
            drawn = known == len(progress.tokens) + progress.in_flight - progress.num_computed
            progress.num_computed += known
            progress.in_flight += drawn
            rows = progress.num_computed - progress.num_charged
            if rows > 0:  # recomputed and cached tokens cost nothing
                self.queues.charge(self.queues.of[seq], rows)
                progress.num_charged = progress.num_computed
            if progress.num_computed >= (progress.num_full + 1) * block_size:
                self.blocks.register(seq)
        self._credit = min(QUANTUM_TOKENS, self._credit + MAX_RECOMPUTED_SHARE * computed)

    def accept(self, seq: Sequence) -> None:
        """Note that one more token of a draft held: it was computed, and the one behind it was drawn."""
        progress, queue = seq.progress, self.queues.of[seq]
        progress.num_computed += 1
        progress.num_charged += 1
        progress.in_flight += 1
        queue.served += 1 / queue.share.weight

    def _may_part(self, plan: Plan) -> bool:
        """Return True if a step is for its prompts alone: first tokens of new queues need not wait for the
        others.

        Those that decode wait as long as in a step of both, for all prompts end in this one.
        """
        prompts = [seq for seq in plan.prompts if seq in plan.lengths]
        return (
            any(self.queues.of[seq].is_new and not seq.share.background for seq in prompts)
            and not any(map(plan.left, prompts))
            and self.step_times.may_part(plan.decodes)
        )

    def _bring_in(self, plan: Plan) -> float:
        """Let adapters arrive in the order of the queues that wait for them.

        Returns the counter from which on no queue begins on an adapter, since another waits for a place in the
        bank that queues so far ahead have to leave.
        """
        self._note_residents()
        starved = [
            queue for queue in self._starved if queue.waiting and self._presence(queue) is Presence.STARVED
        ]
        if not starved:
            return math.inf
        first = min(starved, key=lambda queue: queue.rank)
        quantum = self._quantum(first)
        ahead = self._far_ahead(first, plan, quantum, lambda queue: bool(queue.adapters))
        if ahead and not self._residents.releasing:
            self._displace(ahead[0].adapters, plan)
        return first.served + quantum

    def _note_residents(self) -> None:
        """Say who waits for which adapter, and note who can be served now, where that has changed."""
        if not self._residents.wanting and self._residents.changes == self._seen:
            return
        self._seen = self._residents.changes
        waiting = [queue for queue in self.queues.waiting if queue.adapters]
        ranks: dict[Adapter, Rank] = {}
        for queue in waiting:
            for adapter in queue.adapters:
                ranks[adapter] = min(ranks.get(adapter, queue.rank), queue.rank)
        together = sorted((queue for queue in waiting if len(queue.adapters) > 1), key=lambda queue: queue.rank)
        self._residents.bring_in(ranks, [queue.adapters for queue in together])
        self._starved = []
        for queue in waiting:
            presence = self._presence(queue)
            self.queues.count(queue, counted=presence is not Presence.ABSENT)
            if presence is Presence.STARVED:
                self._starved.append(queue)

    def _presence(self, queue: SequenceQueue) -> Presence:
        """Return the presence of a queue's adapters: that of the one that is furthest from the bank."""
        found = [self._residents.presence(adapter) for adapter in queue.adapters]
        absent = (each for each in (Presence.ABSENT, Presence.STARVED) if each in found)
        return next(absent, Presence.RESIDENT)

    def _decode(self, decodes: list[Sequence], plan: Plan) -> None:
        """Give those that decode their row; who is furthest ahead gives up the blocks that they lack."""
        lengths, preempted = plan.lengths, plan.preempted
        for seq in decodes:
            if not plan.budget:
                return
            progress = seq.progress
            if seq in preempted or (progress.in_flight and progress.length >= progress.end):
                continue
            lengths[seq] = 1
            plan.budget -= 1
            if progress.num_computed >= progress.room:
                self._grow(seq, plan)

    def _grow(self, seq: Sequence, plan: Plan) -> None:
        """Take the blocks that a sequence lacks for its rows from who is furthest ahead."""
        while seq not in plan.preempted and not self.blocks.grow(
            seq, seq.progress.num_computed + plan.lengths[seq]
        ):
            plan.short = True
            running = self.queues.running_queues
            furthest = max(running, key=lambda queue: (queue.served, queue.running[-1].order))
            self._preempt(furthest.running[-1], plan)

    def _take_turns(self, plan: Plan) -> None:
        """Share what is left of a step among prompts under way and those that wait."""
        turns: list[_Turn] = []
        for seq in plan.prompts:
            queue = self.queues.of[seq]
            turns.append((queue.served, 0, seq.order, next(self._numbers), queue, seq))
        turns += [self._turn(queue, plan) for queue in self._candidates(plan)]
        heapq.heapify(turns)
        while turns and not plan.full:
            *_, queue, prompt = heapq.heappop(turns)
            if prompt is not None:
                self._give(prompt, plan)
                continue
            if not queue.waiting or not self._may_join(seq := queue.waiting[0], plan):
                continue
            outcome = self._admit(seq, plan)
            if outcome is _Outcome.BLOCKED:
                turns = [turn for turn in turns if turn[-1] is not None]
                heapq.heapify(turns)
            elif outcome is _Outcome.ADMITTED:
                self._give(seq, plan)
                if queue.waiting:
                    heapq.heappush(turns, self._turn(queue, plan))

    def _turn(self, queue: SequenceQueue, plan: Plan) -> _Turn:
        return plan.counter(queue), 1, queue.waiting[0].order, next(self._numbers), queue, None

    def _give(self, seq: Sequence, plan: Plan) -> None:
        """Give a prompt what finds room; one that would take all of it leaves some to shorter ones."""
        if seq in plan.preempted or not self._may_join(seq, plan):
            return
        if plan.fitting(seq) < plan.left(seq) and seq not in self._passed:
            self._give_shorter(seq, plan)
        rows = self._fitting(seq, plan) if self._may_join(seq, plan) else 0
        if rows > 0:
            plan.give(seq, rows, self.queues.of[seq])
            self._grow(seq, plan)
            self._passed.discard(seq)
        elif self.limits.whole:
            self._passed.add(seq)
        if plan.left(seq):
            plan.budget = 0

    def _may_join(self, seq: Sequence, plan: Plan) -> bool:
        """Return True if a step may have a prompt beside its first one: neither need wait for the other."""
        shorter, longer = sorted((seq.num_prompt, next(iter(plan.lengths), seq).num_prompt))
        return longer <= FAR_SHORTER * shorter or self.step_times.cost_s(0, longer) <= self.limits.part_s

    def _fitting(self, seq: Sequence, plan: Plan) -> int:
        """Rows of a prompt that find room, in layers with a window too; one makes room for itself."""
        rows = plan.whole(seq) if self.limits.whole else plan.fitting(seq)
        if not self.blocks.slides or rows <= 0:
            return rows
        spare = self.limits.watermark if len(self.running) > 1 else None
        reached = seq.progress.num_computed + plan.lengths.get(seq, 0)
        return min(rows, max(1, self.blocks.reach(seq, spare) - reached))

    def _give_shorter(self, long: Sequence, plan: Plan) -> None:
        """Give SHORTER_PROMPTS_SHARE of the rest to shorter prompts, shortest first."""
        kept = 1 - SHORTER_PROMPTS_SHARE
        budget, kept_s = math.ceil(kept * plan.budget), kept * plan.seconds
        plan.budget, plan.seconds = plan.budget - budget, plan.seconds - kept_s
        self._give_all((self._shorter_of_all if self.limits.whole else self._shorter)(long, plan), plan)
        plan.budget += budget
        plan.seconds += kept_s

    def _give_all(self, shorter: Iterator[Sequence], plan: Plan) -> None:
        """Give some prompts their rows, until a step is full."""
        while not plan.full and (seq := next(shorter, None)) is not None:
            plan.give(seq, self._fitting(seq, plan), self.queues.of[seq])
            self._grow(seq, plan)

    def _shorter_of_all(self, long: Sequence, plan: Plan, longest: float = math.inf) -> Iterator[Sequence]:
        """Yield those that wait in any queue which is at most MAX_AHEAD_TOKENS ahead, as far as they fit."""
        most = plan.counter(self.queues.of[long]) + MAX_AHEAD_TOKENS
        queues = [queue for queue in self._candidates(plan) if plan.counter(queue) < most]
        for queue in sorted(queues, key=lambda queue: queue.by_length[0].num_prompt):
            while (
                queue.waiting
                and (seq := queue.by_length[0]).priority >= long.priority
                and seq.num_prompt <= longest
                and plan.fits(seq)
                and self._may_join(seq, plan)
                and self._may_begin(queue, seq, plan)
                and self._admit(seq, plan) is _Outcome.ADMITTED
            ):
                yield seq

    def _shorter(self, long: Sequence, plan: Plan) -> Iterator[Sequence]:
        """Yield those of its queue, under way and waiting, which begin for it; none that is less urgent."""
        queue, left = self.queues.of[long], plan.left(long)
        others = (seq for seq in plan.prompts if self.queues.of[seq] is queue and seq not in plan.preempted)
        running = [seq for seq in others if seq.priority >= long.priority and 0 < plan.left(seq) < left]
        running.sort(key=plan.left, reverse=True)
        while True:
            shortest = plan.left(running[-1]) if running else left
            waits = queue.by_length[0] if queue.waiting else None
            if (
                waits is not None
                and waits.priority >= long.priority
                and waits.num_prompt < shortest
                and self._may_begin(queue, waits, plan)
                and self._admit(waits, plan) is _Outcome.ADMITTED
            ):
                yield waits
            elif running:
                yield running.pop()
            else:
                return

    def _candidates(self, plan: Plan) -> list[SequenceQueue]:
        """Return queues of which one may be admitted, as many as there are seats and places of adapters, and
        one more.

        Where either is short, the additional one may ask only when another is far enough ahead: a step does not
        walk through a thousand waiting ones. Those that wait for a seat alone ask beside those that wait for a
        place too, for queues that are ahead of both may have a seat to give and no place. As many new ones as
        there are seats ask too.
        """
        if not self.num_waiting or plan.short:
            return []
        seats = max(0, self.limits.max_seqs - len(self.running))
        places = max(0, self.limits.max_adapters - len(self.queues.active)) if seats else 0
        asks = bool(places) or self._somebody_is_far_ahead()
        new = self.queues.new if self._credit > 0 else ()
        if not (seats or asks or new):
            return []
        joining = self._may_begin_now(self.queues.joining(), plan)
        if asks:
            known = set(joining)
            joining = joining if seats else heapq.nsmallest(1, joining, key=lambda queue: queue.rank)
            others = self._may_begin_now(
                (queue for queue in self.queues.look_through() if queue not in known), plan
            )
            joining += heapq.nsmallest(places + 1, others, key=lambda queue: queue.rank)
        may = (queue for queue in new if queue.waiting and self._may_begin(queue, queue.waiting[0], plan))
        return list(dict.fromkeys((*joining, *itertools.islice(may, self.limits.max_seqs))))

    def _may_begin_now(self, queues: Iterable[SequenceQueue], plan: Plan) -> list[SequenceQueue]:
        """Return the queues of some whose first waiting sequence nothing of their own blocks."""
        return [queue for queue in queues if self._may_begin(queue, queue.waiting[0], plan)]

    def _somebody_is_far_ahead(self) -> bool:
        """Return True if a queue under way may be far enough ahead of a waiting one to make room."""
        most = max((queue.served for queue in self.queues.running_queues), default=0.0)
        return most - self.queues.lowest >= QUANTUM_TOKENS

    def _may_begin(self, queue: SequenceQueue, seq: Sequence, plan: Plan) -> bool:
        """Return True if nothing that only the queue itself can change blocks a sequence that waits in it."""
        if seq.progress.in_flight or self.queues.is_full(queue):
            return False
        if queue.share.background and not plan.admits_background:
            return False
        return self._may_use(queue)

    def _may_use(self, queue: SequenceQueue) -> bool:
        """Return True if the adapters of a queue are there, and are not to leave for one that waits."""
        return not queue.adapters or (queue.resident and queue.served < self._bound)

    def _admit(self, seq: Sequence, plan: Plan) -> _Outcome:
        """Begin with one that waits, if everything that it needs is there or is made room for."""
        queue = self.queues.of[seq]
        if plan.short:
            return _Outcome.BLOCKED
        if seq in plan.preempted or self.queues.is_full(queue) or not self._finds_place(queue, plan):
            return _Outcome.PASSED
        while len(self.running) >= self.limits.max_seqs:
            if not self._make_room(queue, plan):
                return _Outcome.BLOCKED
        while not self._start(seq):
            if not self._make_room(queue, plan):
                return _Outcome.BLOCKED
        self._stop_waiting(seq)
        self.queues.start(seq)
        bisect.insort(self.running, seq, key=order)
        plan.begin(seq)
        for adapter in seq.adapters:
            self._residents.acquire(adapter)
        return _Outcome.ADMITTED

    def _finds_place(self, queue: SequenceQueue, plan: Plan) -> bool:
        """Return True if its adapters may take part, if need be in the places of those that are far ahead.

        A blend that finds too few places keeps those that are free from the queues behind it.
        """
        active, most = self.queues.active, self.limits.max_adapters
        new = [adapter for adapter in queue.adapters if adapter not in active]
        if not new:
            return True
        lacking = len(active) + len(new) - most
        if lacking <= 0:
            return not plan.crowded
        ahead = self._far_ahead(queue, plan, self._quantum(queue), lambda other: bool(other.adapters))
        may_leave = dict.fromkeys(adapter for other in ahead for adapter in other.adapters)
        leaving = [adapter for adapter in may_leave if adapter not in queue.adapters][:lacking]
        if len(leaving) < lacking:
            plan.crowded |= len(active) < most
            return False
        self._displace(leaving, plan)
        return True

    def _make_room(self, queue: SequenceQueue, plan: Plan) -> bool:
        """Preempt one sequence of the queue that is furthest ahead of this one, if any is far enough."""
        quantum = 0.0 if self._comes_first(queue) else QUANTUM_TOKENS
        ahead = self._far_ahead(queue, plan, quantum, lambda other: not other.is_new)
        if ahead:
            self._preempt(ahead[0].running[-1], plan)
        return bool(ahead)

    def _far_ahead(
        self, queue: SequenceQueue, plan: Plan, quantum: float, may: Callable[[SequenceQueue], bool]
    ) -> list[SequenceQueue]:
        """Return the queues under way that are far enough ahead of another to make room, the furthest first."""
        least = plan.counter(queue) + quantum
        running = (other for other in self.queues.running_queues if other is not queue and may(other))
        ahead = [other for other in running if other.served >= least]
        return sorted(ahead, key=lambda other: other.served, reverse=True)

    def _quantum(self, queue: SequenceQueue) -> float:
        """Return how far others must be ahead of a queue to leave their places among the adapters to it."""
        return FIRST_QUANTUM_TOKENS if self._comes_first(queue) else QUANTUM_TOKENS

    def _comes_first(self, queue: SequenceQueue) -> bool:
        """Return True if a queue is new, and there is credit for it."""
        return queue.is_new and self._credit > 0

    def _displace(self, adapters: Iterable[Adapter], plan: Plan) -> None:
        """Preempt all that are under way on any of some adapters."""
        leaving = set(adapters)
        for seq in [seq for seq in self.running if not leaving.isdisjoint(seq.adapters)]:
            self._preempt(seq, plan)

    def _preempt(self, seq: Sequence, plan: Plan) -> None:
        """Let a sequence under way wait again, also if the step has rows of it already."""
        plan.preempted.add(seq)
        rows = plan.lengths.pop(seq, 0)
        plan.budget += rows
        self._credit -= self.blocks.lost(seq)
        take(self.running, seq)
        self._let_go(seq)
        self.queues.stop(seq)
        self._waits(seq)
        self.preemptions += 1

    def _start(self, seq: Sequence) -> bool:
        """Give a sequence room for its whole context; False, with nothing changed, when it does not fit."""
        spare = self.limits.watermark if self.running else None
        if self.blocks.still_refused(seq, spare):
            return False
        if not self.blocks.start(seq, spare):
            return False
        progress = seq.progress
        progress.num_charged = max(progress.num_charged, progress.num_computed)
        if not seq.num_generated:
            progress.num_cached = progress.num_computed
        return True

    def _waits(self, seq: Sequence) -> None:
        self.num_waiting += 1
        for adapter in seq.adapters:
            self._residents.want(adapter, seq.key_id)

    def _stop_waiting(self, seq: Sequence) -> None:
        self.num_waiting -= 1
        for adapter in seq.adapters:
            self._residents.unwant(adapter, seq.key_id)

    def _let_go(self, seq: Sequence) -> None:
        self.blocks.release(seq)
        for adapter in seq.adapters:
            self._residents.release(adapter)
