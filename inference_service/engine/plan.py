"""A step while it is put together, and its bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from inference_service.core.sequence import Batch, Chunk, Sequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.queues import SequenceQueue
from inference_service.engine.step_times import BRIEF, TIMES, TIMES_OF_BRIEF, StepLoad, StepTimes


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
    """Part of the blocks that admission leaves free, for the next tokens of those under way."""
    speculative_tokens: int = 0
    """Tokens that are drafted for a sequence in a step, at most. 0: none."""

    def reached(self, seq: Sequence, length: int) -> bool:
        """True when a sequence ends by its limit at so many tokens of prompt and answer."""
        return length - seq.num_prompt >= seq.sampling.max_tokens or length >= self.max_seq_len


@dataclass
class Plan:
    """The content of a step so far, and the rest of its budget."""

    budget: int
    """Rows that are left."""
    step_times: StepTimes
    seconds: float = math.inf
    """Seconds that are left for prompts."""
    bound: float = math.inf
    """The counter from which on nobody begins on an adapter."""
    lengths: dict[Sequence, int] = field(default_factory=dict)
    prompts: list[Sequence] = field(default_factory=list)
    """Under way when the step began, or admitted into it; in the order of those under way."""
    preempted: set[Sequence] = field(default_factory=set)
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    short: bool = False
    """True if those under way lacked blocks, so that no new sequence may take some."""
    crowded: bool = False
    """True if a blend waits for places of adapters, so that no sequence behind it may have those that
    are free.
    """
    decodes: int = 0
    """Sequences that decode in it."""
    brief: bool = True
    """True if it may take as long as one whose prompts are all brief."""
    ahead: dict[SequenceQueue, float] = field(default_factory=dict)
    """Rows of queues in this step, for which they are charged when it was submitted."""

    @property
    def full(self) -> bool:
        """Return True if it has no room for prompts any longer."""
        return self.budget <= 0 or self.seconds < 0

    def counter(self, queue: SequenceQueue) -> float:
        """Return a queue's counter, this step included."""
        return queue.served + self.ahead.get(queue, 0.0)

    def limit(self, decodes: int) -> None:
        """Bound prompts by the step-time model, beside so many that decode."""
        self.decodes, self.brief = decodes, all(map(_is_brief, self.prompts))
        room = self.step_times.room(decodes, TIMES_OF_BRIEF if self.brief else TIMES)
        self.budget, self.seconds = int(min(self.budget, room.rows)), room.seconds

    def begin(self, seq: Sequence) -> None:
        """Take in a prompt that was admitted; beside one that is not brief, prompts have less of the step."""
        self.prompts.append(seq)
        if self.brief and not _is_brief(seq):
            self.brief = False
            more, less = (self.step_times.room(self.decodes, times) for times in (TIMES_OF_BRIEF, TIMES))
            self.seconds -= more.seconds - less.seconds

    def fitting(self, seq: Sequence) -> int:
        """Rows of a prompt that find room, beside those that it has."""
        granted = self.lengths.get(seq, 0)
        rows = self.step_times.rows(seq.progress.num_computed + granted, self.seconds)
        return int(min(self.left(seq), self.budget, rows))

    def left(self, seq: Sequence) -> int:
        """Rows of a prompt that it has not been given, up to where its chunk must end."""
        return min(seq.progress.num_pending, seq.bound - seq.progress.num_computed) - self.lengths.get(seq, 0)

    def give(self, seq: Sequence, rows: int, queue: SequenceQueue) -> None:
        """Give a step rows of a prompt, behind those that it has; its queue is charged for them."""
        granted = self.lengths.get(seq, 0)
        self.lengths[seq] = granted + rows
        self.ahead[queue] = self.ahead.get(queue, 0.0) + rows / queue.share.weight
        self.budget -= rows
        self.seconds -= self.step_times.cost_s(seq.progress.num_computed + granted, rows)

    def load(self) -> StepLoad:
        """Return the work of the step, for the step-time model."""
        chunks = [(self.lengths[seq], seq.progress.num_computed) for seq in self.prompts if seq in self.lengths]
        rows = sum(length for length, _ in chunks)
        area = sum(length * (start + length / 2) for length, start in chunks)
        return StepLoad(len(self.lengths) - len(chunks), rows, area, sum(map(len, self.drafts.values())))

    def batch(self, blocks: BlockManager) -> Batch:
        """Return it as it is, with what must be copied in the cache before it."""
        if not self.lengths:
            return Batch(())
        if not self.drafts:
            chunks = [Chunk(seq, length) for seq, length in self.lengths.items()]
            return Batch(tuple(chunks), copies=blocks.copies())
        drafted = self.drafts
        chunks = [Chunk(seq, length, len(drafted.get(seq, ()))) for seq, length in self.lengths.items()]
        return Batch(tuple(chunks), drafted, blocks.copies())


def _is_brief(seq: Sequence) -> bool:
    return seq.num_prompt - seq.progress.num_cached <= BRIEF
