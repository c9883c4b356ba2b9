"""The engine: a step is schedule, submit, resolve. Single-threaded; `serving` owns the thread."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import structlog

from inference_service.core.adapter import Adapter
from inference_service.core.sequence import Batch, EndReason, Sequence, StepOutput, Token, Vector
from inference_service.engine.execution.runner import Pending, StepRunner
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import BlockUse, StateUse
from inference_service.engine.scheduling.lookup import Lookup
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from inference_service.engine.scheduling.scheduler import Scheduler
from inference_service.engine.scheduling.search import Search
from inference_service.engine.scheduling.step_times import StepTimes
from loramux_shared.faults import ModelUnusable, NumericsFault

OVERFLOWS: Final = 3
WITHIN_S: Final = 60.0
"""Period in which so many such answers make an adapter refused."""

log = structlog.get_logger()


def overflowed(seq: Sequence, now_s: float) -> NumericsFault:
    """Return why a sequence ends whose logits or vector are no numbers, and count that for its adapter.

    A blend counts for none of its adapters, since the request has chosen their weights; nor does the warm-up,
    which has no model's name.
    """
    adapter = seq.adapter
    digest = "" if adapter is None else adapter.digest[:12]
    log.warning("answer failed: it holds NaN or infinity", model=seq.model, digest=digest, request=seq.id)
    if isinstance(adapter, Adapter) and seq.model:
        _count(adapter, seq.model, now_s)
    if adapter is None:
        return NumericsFault(
            "the base computed NaN or infinity. Serve it in a type that holds its values (LORAMUX_DTYPE)."
        )
    return NumericsFault(
        "the adapter made NaN or infinity of the base's values: its weights overflow. Replace it by an earlier "
        "checkpoint, or ask another model."
    )


def _count(adapter: Adapter, model: str, now_s: float) -> None:
    adapter.overflows_s = (*(at for at in adapter.overflows_s if now_s - at < WITHIN_S), now_s)
    if len(adapter.overflows_s) < OVERFLOWS or adapter.unusable is not None:
        return
    adapter.unusable = ModelUnusable(
        f"{OVERFLOWS} of its answers within {WITHIN_S:g} s held NaN or infinity, so this replica refuses the "
        f"version {adapter.digest[:12]}. Push or load another version under this name."
    )
    log.error(
        "adapter is refused from now on: its answers hold NaN or infinity",
        model=model,
        digest=adapter.digest[:12],
        reason=adapter.unusable.reason,
    )


@dataclass(frozen=True)
class EngineStats:
    """The content of the engine now, and its counters."""

    waiting: int
    running: int
    blocks_free: int
    blocks_total: int
    block_size: int
    """Tokens per block."""
    max_adapters: int
    """Distinct adapters of a step, at most."""
    preemptions: int
    prefix_tokens_queried: int
    """Tokens looked up in the prefix cache."""
    prefix_tokens_hit: int
    """Tokens of those whose keys and values were cached."""
    tokens_generated: int
    """Tokens of answers, those of answers under way included."""
    tokens_drafted: int = 0
    """Tokens that were drafted."""
    tokens_accepted: int = 0
    """Tokens of those that became tokens of answers."""
    left: int = 0
    """Sequences that the last step left waiting; `waiting` has those too that came since."""
    seats: int = 0
    """Sequences that may run at once."""

    @property
    def prefix_hit_rate(self) -> float:
        """Part of the queried tokens that were cached."""
        return self.prefix_tokens_hit / max(1, self.prefix_tokens_queried)


@dataclass(frozen=True)
class SequenceCounts:
    """The numbers of sequences, by the names of models."""

    running: Mapping[str, int]
    waiting: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """The content of an engine between two steps, for a person who looks for what is stuck or was not freed."""

    stats: EngineStats
    running: tuple[str, ...]
    """Ids of sequences, the most urgent first."""
    waiting: tuple[str, ...]
    """Ids of sequences, queue by queue."""
    aside: tuple[str, ...]
    """Ids of sequences that wait for the end of the search for one that a step raises for."""
    draft_tokens: int
    """Tokens that are drafted for a sequence in a step, at most."""
    drafting: tuple[str, ...]
    """Ids of sequences with a record of what may follow them."""
    draft_blocks: tuple[BlockUse, ...]
    """The blocks of a draft model, of each group of its layers; empty without one."""
    served: Mapping[tuple[str, tuple[str, ...]], float]
    """Rows that each scheduling queue was served, by weight; by its flow and its adapters' digests."""
    resident: tuple[str, ...]
    """Digests of the adapters that the bank holds."""
    steps: int
    """Steps that were submitted and are not over."""
    blocks: tuple[BlockUse, ...]
    """The blocks of each group of layers that see equally far."""
    states: StateUse | None
    """None where no layer carries a state."""


class Engine:
    """Sequences in, tokens out.

    With a runner of depth 1, a step is submitted before the tokens of the one before are looked at. A sequence
    that turns out to have ended, or was aborted, then has a row too many in the step under way: what that draws
    is dropped, and what it writes to the cache is written before any later step can use its blocks.
    """

    def __init__(
        self,
        runner: StepRunner,
        limits: SchedulerLimits,
        blocks: BlockManager,
        residency: Residents,
        clock: Callable[[], float] = time.monotonic,
        lookup: Lookup | None = None,
        step_times: StepTimes | None = None,
    ) -> None:
        """Run the steps that a scheduler of these parts chooses; clock is in seconds."""
        self._residency = residency
        self._runner = runner
        self._limits = limits
        self._blocks = blocks
        self._scheduler = Scheduler(limits, blocks, residency, lookup, step_times)
        self._seqs: dict[str, Sequence] = {}
        self._aside: dict[str, Sequence] = {}
        """Those that the scheduler does not have, while a search for the one that a step raises for goes on."""
        self._search = Search()
        self._pending: deque[Pending] = deque()
        self._spare_s: float | None = None
        """How long the oldest step has run by itself, less what others took between its parts; None where none
        of it is left to compute here."""
        self._outputs: list[StepOutput] = []  # not handed out yet: a step that raises loses none
        self._earliest_s = math.inf  # no deadline of a sequence comes before
        self._arrivals = 0
        self._generated = 0
        self._left = 0
        self._clock = clock
        self.draft(limits.speculative_tokens)

    def draft(self, tokens: int) -> None:
        """Draft up to so many tokens a step from now on; none with a runner a step ahead, or with states.

        What a step verifies, the one behind it would have to know already; and a state that took in a token
        which did not hold cannot be cut back.
        """
        if self._runner.depth or self._blocks.states is not None:
            tokens = 0
        self._scheduler.limits = replace(self._limits, speculative_tokens=tokens)

    @property
    def idle(self) -> bool:
        """True when no sequence is under way or waits, but those that are set aside."""
        return not self._seqs

    @property
    def idle_until_s(self) -> float:
        """When the next step has something to do, on the engine's clock; infinite: when something arrives."""
        busy = self._scheduler.running or self._pending or self._outputs or self._scheduler.may_begin
        return (
            -math.inf
            if busy or self._search.has_passed(self._seqs)
            else min(self._earliest_s, self._residency.retry_s)
        )

    @property
    def resting_until_s(self) -> float:
        """When `rest` has something to do, on the engine's clock; infinite: when something arrives."""
        return -math.inf if self._pending or self._outputs else self._earliest_s

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        return EngineStats(
            waiting=self._scheduler.num_waiting + len(self._aside),
            running=len(self._scheduler.running),
            blocks_free=self._blocks.num_free,
            blocks_total=self._blocks.num_blocks,
            block_size=self._blocks.block_size,
            max_adapters=self._limits.max_adapters,
            preemptions=self._scheduler.preemptions,
            prefix_tokens_queried=self._blocks.stats.queried,
            prefix_tokens_hit=self._blocks.stats.hit,
            tokens_generated=self._generated,
            tokens_drafted=self._scheduler.lookup.drafted,
            tokens_accepted=self._scheduler.lookup.accepted,
            left=self._left,
            seats=self._limits.max_seqs,
        )

    def inspect(self) -> Inspection:
        """Return a snapshot in full; takes time that grows with the blocks, between two steps."""
        scheduler, states = self._scheduler, self._blocks.states
        queues = {(each.flow, tuple(one.digest for one in each.adapters)): each for each in scheduler.queues}
        return Inspection(
            stats=self.stats,
            running=tuple(seq.id for seq in scheduler.running),
            waiting=tuple(seq.id for seq in scheduler.waiting),
            aside=tuple(self._aside),
            draft_tokens=scheduler.limits.speculative_tokens,
            drafting=scheduler.lookup.followed,
            draft_blocks=scheduler.lookup.cache,
            served={key: queue.served for key, queue in queues.items()},
            resident=tuple(adapter.digest for adapter in self._residency.resident()),
            steps=scheduler.step_times.num_submitted,
            blocks=self._blocks.inspect(),
            states=None if states is None else states.inspect(),
        )

    @property
    def sequence_counts(self) -> SequenceCounts:
        """Return the running and waiting sequences; may be called on another thread."""
        running = tuple(self._scheduler.running)
        waiting = (*self._scheduler.waiting, *tuple(self._aside.values()))
        return SequenceCounts(
            *(Counter(name for seq in seqs for name in _names(seq)) for seqs in (running, waiting))
        )

    def add(self, seq: Sequence) -> None:
        """Take a sequence in; it ends with one output that has a finish reason, unless it is aborted.

        One with an adapter that could not be loaded a moment ago, or is no longer served, ends at once.
        """
        unusable = (adapter.unusable for adapter in seq.adapters)
        fault = next(filter(None, (*unusable, *map(self._residency.refusal, seq.adapters))), None)
        if fault is not None:
            self._outputs.append(StepOutput(seq.id, None, EndReason.FAILED, fault=fault))
            return
        self._arrivals += 1
        seq.progress.arrival = self._arrivals
        self._earliest_s = min(self._earliest_s, _deadline(seq))
        if self._search.trial:
            self._aside[seq.id] = seq
        else:
            self._let_in(seq)

    def abort(self, seq_id: str) -> None:
        """Forget a sequence and free what it holds; no output follows. Unknown ids are ignored."""
        seq = self._seqs.pop(seq_id, None)
        if seq is not None:
            self._scheduler.remove(seq)
        else:
            self._aside.pop(seq_id, None)

    def step(self) -> list[StepOutput]:
        """Submit one batch, and return the outputs of the oldest one under way if the runner is full."""
        began_s = self._expire()
        if self._spare_s is not None:
            batch = self._scheduler.schedule_between(self._spare_s)
        else:
            batch = self._scheduler.schedule()
        self._left = self._scheduler.num_waiting
        self._end_failed_loads()
        if batch.chunks:
            self._begin(batch)
            pending = self._runner.submit(batch)
            self._scheduler.commit(batch, began_s)
            if self._spare_s is not None:
                self._resolve(pending, between=True)
                self._spare_s -= self._clock() - began_s
                return self._hand_out()
            self._pending.append(pending)
            self._residency.submitted()
        if len(self._pending) > (self._runner.depth if batch.chunks else 0):
            self._go_on()
        for pending in self._pending:
            pending.finish()
        if self._search.has_passed(self._seqs):
            self._resolve_all()
            self._withdraw()
            self.retry()
        return self._hand_out()

    def rest(self) -> list[StepOutput]:
        """Resolve what is under way and begin nothing; sequences stay as they are, until their deadlines."""
        self._resolve_all()
        self._expire()
        return self._hand_out()

    def set_aside(self) -> list[StepOutput]:
        """Take every sequence out of the scheduler, after a step that raised, until `retry`.

        Their known tokens are computed again, for the step may have written to any block and state that they
        had. A sequence that a step is known to raise for ends as FAILED.
        """
        running = [seq.id for seq in self._scheduler.running] or list(self._seqs)
        self._forget_steps()
        self._withdraw()
        found = self._search.divide(running)
        for seq in filter(None, map(self._aside.get, found)):
            log.error("request failed: an engine step raises for it", request=seq.id, model=seq.model)
        self._end(found, EndReason.FAILED)
        return self._hand_out()

    def retry(self) -> None:
        """Let in the next group that a step may raise for; after the last one, all that were set aside."""
        group = self._search.next_group(self._aside)
        for seq_id in group or tuple(self._aside):
            self._let_in(self._aside.pop(seq_id))
        self._search.trial = {seq_id: len(self._seqs[seq_id].progress.tokens) for seq_id in group}
        self._earliest_s = -math.inf  # unknown

    def fail_all(self) -> list[StepOutput]:
        """End every sequence that is not set aside as FAILED, after a step that raised."""
        self._forget_steps()
        self._end(tuple(self._seqs), EndReason.FAILED)
        return self._hand_out()

    def _forget_steps(self) -> None:
        self._pending.clear()
        self._spare_s = None
        self._scheduler.step_times.forget_steps()
        self._residency.resolved(everything=True)
        self._blocks.forget_all()

    def _let_in(self, seq: Sequence) -> None:
        self._seqs[seq.id] = seq
        self._scheduler.add(seq)

    def _withdraw(self) -> None:
        """Set every sequence aside, as another object: what the runner knows of the old one is not used."""
        for seq in self._seqs.values():
            self._scheduler.remove(seq)
            seq.progress.restart()
            self._aside[seq.id] = copy(seq)
        self._seqs.clear()

    def _begin(self, batch: Batch) -> None:
        now_s = self._clock()
        for chunk in batch.chunks:
            if chunk.seq.progress.began_s is None:
                chunk.seq.progress.began_s = now_s

    def _hand_out(self) -> list[StepOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _end(self, seq_ids: Iterable[str], reason: EndReason) -> None:
        for seq_id in seq_ids:
            self.abort(seq_id)
            self._outputs.append(StepOutput(seq_id, None, reason))

    def _end_failed_loads(self) -> None:
        """End the sequences that wait for adapters that cannot be loaded, or not together."""
        failures = self._residency.failures
        while failures:
            adapters, fault = failures.popleft()
            for seq in self._scheduler.waiting_for(adapters):
                self.abort(seq.id)
                self._outputs.append(StepOutput(seq.id, None, EndReason.FAILED, fault=fault))

    def _go_on(self) -> None:
        """Compute a part of the oldest step, unless nobody waits for it; resolve it when nothing is left."""
        began_s = self._clock()
        if self._spare_s is not None and not self._scheduler.under_way:
            self._pending.clear()
            self._scheduler.step_times.forget_steps()
            self._residency.resolved()
        elif self._pending[0].go_on():
            self._spare_s = (self._spare_s or 0.0) + self._clock() - began_s
            return
        else:
            self._resolve(self._pending.popleft())
        self._spare_s = None

    def _resolve_all(self) -> None:
        """Wait for what is under way."""
        self._spare_s = None
        while self._pending:
            self._resolve(self._pending.popleft())

    def _resolve(self, pending: Pending, *, between: bool = False) -> None:
        """Wait for a step; what it drew for sequences that ended meanwhile is dropped.

        One between two parts of another is over before anything leaves the bank.
        """
        accepted = dict.fromkeys(pending.drafts, -1)
        tokens = pending.tokens()
        self._scheduler.step_times.resolved(self._clock(), between=between)
        for seq, token in tokens:
            if self._seqs.get(seq.id) is not seq:
                continue
            if seq in accepted:
                accepted[seq] += 1
                if accepted[seq]:
                    self._scheduler.accept(seq)
            self._outputs.append(self._append(seq, token))
        for seq, vector in pending.vectors():
            if self._seqs.get(seq.id) is seq:
                self._outputs.append(self._pooled(seq, vector))
        for seq, count in accepted.items():
            self._scheduler.lookup.learn(len(pending.drafts[seq]), max(0, count))
        if not between:
            self._residency.resolved()

    def _overflowed(self, seq: Sequence) -> StepOutput:
        """End a sequence whose values are no numbers; nothing of it is found by others."""
        fault = overflowed(seq, self._clock())
        self._blocks.forget(seq)
        self.abort(seq.id)
        for adapter in seq.adapters:
            if adapter.unusable is not None:
                self._residency.failures.append(((adapter,), adapter.unusable))
        return StepOutput(seq.id, None, EndReason.FAILED, fault=fault)

    def _append(self, seq: Sequence, token: Token) -> StepOutput:
        progress, tokens = seq.progress, seq.progress.tokens
        first = len(tokens) == seq.num_prompt
        if not token.finite or (
            first and any(score.logprob != score.logprob for score in progress.prompt_scores)
        ):
            return self._overflowed(seq)
        tokens.append(token.id)
        progress.in_flight -= 1
        finish = self._finish_reason(seq, token)
        if finish:
            self._blocks.register(seq)
            self.abort(seq.id)
        drawn = token if seq.sampling.max_tokens else None  # None: the request asked for the prompt only
        self._generated += drawn is not None
        scores = tuple(progress.prompt_scores) if first else ()
        return StepOutput(seq.id, drawn, finish, first, scores)

    def _pooled(self, seq: Sequence, vector: Vector) -> StepOutput:
        if not np.isfinite(vector).all():
            return self._overflowed(seq)
        self.abort(seq.id)
        return StepOutput(seq.id, None, EndReason.LENGTH, first=True, pooled=vector)

    def _finish_reason(self, seq: Sequence, token: Token) -> EndReason | None:
        if not seq.sampling.max_tokens:
            return EndReason.LENGTH
        if token.impossible:
            return EndReason.FAILED
        if token.id in seq.sampling.stop_token_ids:
            return EndReason.STOP
        if seq.grammar is not None:
            seq.grammar.accept(token.id)
            if seq.grammar.failure:
                return EndReason.FAILED
            if seq.grammar.complete:
                return EndReason.STOP
        return EndReason.LENGTH if len(seq.progress.tokens) >= seq.progress.end else None

    def _expire(self) -> float:
        """End those whose deadline has passed; return the time."""
        now = self._clock()
        if self._earliest_s <= now:
            aside = self._aside.values() if self._search.trial else ()  # else a probe runs, which drops outputs
            seqs = [*self._seqs.values(), *aside]
            self._end([seq.id for seq in seqs if _deadline(seq) <= now], EndReason.DEADLINE)
            left = (deadline for deadline in map(_deadline, seqs) if deadline > now)
            self._earliest_s = min(left, default=math.inf)
        return now


def _names(seq: Sequence) -> tuple[str, ...]:
    return seq.counted or (seq.model,)


def _deadline(seq: Sequence) -> float:
    return math.inf if seq.deadline_s is None else seq.deadline_s
