"""Which tokens of which sequences the next step computes. No tensors here."""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

from inference_service.core.batch import Batch, Chunk
from inference_service.core.sequence import Sequence
from inference_service.engine.block_manager import BlockManager


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

    def reached(self, seq: Sequence, length: int) -> bool:
        """True when a sequence ends by its limit at so many tokens of prompt and answer."""
        return length - seq.num_prompt >= seq.sampling.max_tokens or length >= self.max_seq_len


class Scheduler:
    """Mixes decode and prefill under one token budget.

    Sequences under way come first, oldest and most urgent ahead; then waiting ones are admitted in order. When
    blocks run out, the least urgent sequence under way gives its own back and waits again (its tokens are kept
    and recomputed). A waiting sequence whose adapter does not fit the batch lets others pass, but from then on
    no adapter that is not in the batch yet is admitted ahead of it; and once max_seqs others have passed, none
    of the adapters in the batch either, so that a seat comes free for it in the end.

    A token in flight counts as a token: its sequence is scheduled again before it is known, unless it is the
    last one. A preempted sequence waits for a step at least, and then it is known.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """Both in their order; the last one is the least urgent."""
        self.preemptions = 0
        self._queues: defaultdict[int, list[Sequence]] = defaultdict(list)
        """Those that wait, by their adapter's uid, each in order."""
        self._watermark = max(1, int(limits.watermark * blocks.num_blocks))

    def add(self, seq: Sequence) -> None:
        """Put a sequence in the queue."""
        bisect.insort(self.waiting, seq, key=_order)
        bisect.insort(self._queues[seq.adapter_uid], seq, key=_order)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if _take(self.running, seq):
            self.blocks.release(seq)
        else:
            self._dequeue(seq)

    def schedule(self) -> Batch:
        """Choose the chunks of the next step; empty when there is nothing to do."""
        lengths: dict[Sequence, int] = {}
        preemptions = self.preemptions
        budget = self._continue_running(lengths)
        if self.preemptions == preemptions:
            self._admit(lengths, budget)
        return Batch(tuple([Chunk(seq, length) for seq, length in lengths.items()]))

    def commit(self, batch: Batch) -> None:
        """Note that a batch was submitted: for every later step, its keys and values are in the cache."""
        for chunk in batch.chunks:
            seq, drawn = chunk.seq, chunk.samples
            seq.num_computed += chunk.length
            seq.in_flight += drawn
            self.blocks.register(seq)

    def _continue_running(self, lengths: dict[Sequence, int]) -> int:
        """Schedule those under way, decodes first, which a long prompt never delays; return the rows left."""
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self.running:
            (prompts if seq.num_pending > 1 else decodes).append(seq)
        preempted: set[Sequence] = set()
        budget = self.limits.max_tokens
        for seq in chain(decodes, prompts):
            if not budget:
                break
            if seq in preempted or (seq.in_flight and self._waits_for_its_token(seq)):
                continue
            lengths[seq] = length = min(seq.num_pending, budget)
            budget -= length
            while seq not in preempted and not self.blocks.grow(seq, seq.num_computed + length):
                victim = self._preempt()
                preempted.add(victim)
                budget += lengths.pop(victim, 0)
        return budget

    def _waits_for_its_token(self, seq: Sequence) -> bool:
        return self.limits.reached(seq, seq.length)

    def _preempt(self) -> Sequence:
        """Let the least urgent sequence under way wait again."""
        victim = self.running.pop()
        self.blocks.release(victim)
        self.preemptions += 1
        self.add(victim)
        return victim

    def _admit(self, lengths: dict[Sequence, int], budget: int) -> None:
        if not self.waiting or not budget or len(self.running) >= self.limits.max_seqs:
            return
        adapters = {seq.adapter_uid for seq in self.running} - {0}
        while budget and len(self.running) < self.limits.max_seqs:
            seq = self._next(adapters)
            if seq is None or not self._start(seq):
                return
            if seq.adapter_uid and seq is not self.waiting[0]:
                self.waiting[0].passed_by += 1
            self._dequeue(seq)
            bisect.insort(self.running, seq, key=_order)
            lengths[seq] = min(seq.num_pending, budget)
            budget -= lengths[seq]
            adapters |= {seq.adapter_uid} - {0}

    def _next(self, adapters: set[int]) -> Sequence | None:
        """The first in the queue whose adapter may join the batch now; those before it are passed by."""
        if not self.waiting:
            return None
        first = self.waiting[0]
        uid = first.adapter_uid
        if not uid or uid in adapters or len(adapters) < self.limits.max_adapters:
            return first
        joining = adapters if first.passed_by < self.limits.max_seqs else ()
        heads = [queue[0] for uid in (0, *joining) if (queue := self._queues.get(uid))]
        return min(heads, key=_order, default=None)

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

    def _dequeue(self, seq: Sequence) -> None:
        if _take(self.waiting, seq):
            queue = self._queues[seq.adapter_uid]
            _take(queue, seq)
            if not queue:
                del self._queues[seq.adapter_uid]


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order


def _take(ordered: list[Sequence], seq: Sequence) -> bool:
    """Take a sequence out of where it may be."""
    place = bisect.bisect_left(ordered, seq.order, key=_order)
    found = place < len(ordered) and ordered[place] is seq
    if found:
        del ordered[place]
    return found
