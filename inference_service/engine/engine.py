"""The engine: a step is schedule, run, postprocess. Single-threaded; `serving` owns the thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from inference_service.core.sequence import FinishReason, Sequence, StepOutput, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.runner import Runner
from inference_service.engine.scheduler import Limits, Scheduler


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and what it has done."""

    waiting: int
    running: int
    blocks_free: int
    blocks_total: int
    preemptions: int
    prefix_tokens_queried: int
    """Tokens of admitted sequences."""
    prefix_tokens_hit: int
    """Of those, tokens whose keys and values were cached."""

    @property
    def prefix_hit_rate(self) -> float:
        """Part of the queried tokens that were cached."""
        return self.prefix_tokens_hit / max(1, self.prefix_tokens_queried)


class Engine:
    """Sequences in, tokens out."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        blocks: BlockManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._limits = limits
        self._blocks = blocks
        self._scheduler = Scheduler(limits, blocks)
        self._seqs: dict[str, Sequence] = {}
        self._arrivals = 0
        self._clock = clock

    @property
    def idle(self) -> bool:
        """True when no sequence is under way or waits."""
        return not self._seqs

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            blocks_free=self._blocks.num_free,
            blocks_total=self._blocks.num_blocks,
            preemptions=self._scheduler.preemptions,
            prefix_tokens_queried=self._blocks.stats.queried,
            prefix_tokens_hit=self._blocks.stats.hit,
        )

    def add(self, seq: Sequence) -> None:
        """Take a sequence in; it ends with one output that has a finish reason, unless it is aborted."""
        self._arrivals += 1
        seq.arrival = self._arrivals
        self._seqs[seq.id] = seq
        self._scheduler.add(seq)

    def abort(self, seq_id: str) -> None:
        """Forget a sequence and free what it holds; no output follows. Unknown ids are ignored."""
        seq = self._seqs.pop(seq_id, None)
        if seq is not None:
            self._scheduler.remove(seq)

    def step(self) -> list[StepOutput]:
        """Compute one batch."""
        expired = self._expire()
        batch = self._scheduler.schedule()
        if not batch.chunks:
            return expired
        tokens = self._runner.run(batch)
        self._scheduler.commit(batch)
        return expired + [self._append(seq, token) for seq, token in tokens]

    def fail_all(self) -> list[StepOutput]:
        """End every sequence as FAILED, after a step that raised."""
        outputs = [StepOutput(seq_id, None, FinishReason.FAILED) for seq_id in self._seqs]
        for seq_id in tuple(self._seqs):
            self.abort(seq_id)
        return outputs

    def _append(self, seq: Sequence, token: Token) -> StepOutput:
        seq.tokens.append(token.id)
        finish = self._finish_reason(seq, token)
        if finish:
            self.abort(seq.id)
        return StepOutput(seq.id, token, finish, seq.num_cached, first=seq.num_generated == 1)

    def _finish_reason(self, seq: Sequence, token: Token) -> FinishReason | None:
        if token.id in seq.sampling.stop_token_ids:
            return FinishReason.STOP
        if seq.num_generated >= seq.sampling.max_tokens or len(seq.tokens) >= self._limits.max_seq_len:
            return FinishReason.LENGTH
        return None

    def _expire(self) -> list[StepOutput]:
        now = self._clock()
        late = [seq.id for seq in self._seqs.values() if seq.deadline_s is not None and seq.deadline_s <= now]
        for seq_id in late:
            self.abort(seq_id)
        return [StepOutput(seq_id, None, FinishReason.DEADLINE) for seq_id in late]
