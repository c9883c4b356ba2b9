"""Which tokens of which sequences the next step computes. No tensors here."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

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
        self._watermark = max(1, int(limits.watermark * blocks.num_blocks))

    def add(self, seq: Sequence) -> None:
        """Put a sequence in the queue."""
        bisect.insort(self.waiting, seq, key=_order)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if seq in self.running:
            self.running.remove(seq)
            self.blocks.release(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def schedule(self) -> Batch:
        """Choose the chunks of the next step; empty when there is nothing to do."""
        chunks: list[Chunk] = []
        preemptions = self.preemptions
        budget = self._continue_running(chunks, self.limits.max_tokens)
        if self.preemptions == preemptions:
            self._admit(chunks, budget)
        return Batch(tuple(chunks))

    def commit(self, batch: Batch) -> None:
        """Note that a batch was submitted: for every later step, its keys and values are in the cache."""
        for chunk in batch.chunks:
            seq, drawn = chunk.seq, chunk.samples
            seq.num_computed += chunk.length
            seq.in_flight += drawn
            self.blocks.register(seq)

    def _continue_running(self, chunks: list[Chunk], budget: int) -> int:
        """Schedule those under way: decodes first, so that a long prompt never delays them."""
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self.running:
            (prompts if seq.num_pending > 1 else decodes).append(seq)
        preempted: set[Sequence] = set()
        for seq in (*decodes, *prompts):
            if not budget:
                break
            if seq in preempted or self._waits_for_its_token(seq):
                continue
            length = min(seq.num_pending, budget)
            if self._make_room(seq, seq.num_computed + length, preempted):
                chunks.append(Chunk(seq, length))
                budget -= length
            if preempted:
                chunks[:] = [chunk for chunk in chunks if chunk.seq not in preempted]
                budget = self.limits.max_tokens - sum(chunk.length for chunk in chunks)
        return budget

    def _waits_for_its_token(self, seq: Sequence) -> bool:
        return seq.in_flight > 0 and self.limits.reached(seq, seq.length)

    def _make_room(self, seq: Sequence, num_tokens: int, preempted: set[Sequence]) -> bool:
        """Grow a sequence, at the cost of the least urgent ones; False when it was preempted itself."""
        while not self.blocks.grow(seq, num_tokens):
            victim = self.running.pop()
            self.blocks.release(victim)
            self.preemptions += 1
            self.add(victim)
            preempted.add(victim)
            if victim is seq:
                return False
        return True

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        adapters = {seq.adapter_uid for seq in self.running} - {0}
        blocked: Sequence | None = None
        index = 0
        while index < len(self.waiting) and budget and len(self.running) < self.limits.max_seqs:
            seq = self.waiting[index]
            if not self._fits(seq, adapters, blocked):
                blocked = blocked or seq
                index += 1
                continue
            if not self._start(seq, chunks, budget):
                return
            del self.waiting[index]
            budget -= chunks[-1].length
            if seq.adapter_uid:
                adapters.add(seq.adapter_uid)
                if blocked:
                    blocked.passed_by += 1

    def _fits(self, seq: Sequence, adapters: set[int], blocked: Sequence | None) -> bool:
        """True when the adapter of a sequence may join the batch now."""
        if not seq.adapter_uid:
            return True
        if seq.adapter_uid in adapters:
            return blocked is None or blocked.passed_by < self.limits.max_seqs
        return blocked is None and len(adapters) < self.limits.max_adapters

    def _start(self, seq: Sequence, chunks: list[Chunk], budget: int) -> bool:
        """Admit a sequence whose whole context fits; False, with nothing changed, when it does not."""
        self.blocks.admit(seq)
        needed = self.blocks.blocks_for(len(seq.tokens)) - len(seq.blocks)
        reserve = self._watermark if self.running else 0
        if needed + reserve > self.blocks.num_free:
            self.blocks.release(seq)
            return False
        self.blocks.grow(seq, len(seq.tokens))
        self.blocks.count(seq)
        if not seq.num_generated:
            seq.num_cached = seq.num_computed
        bisect.insort(self.running, seq, key=_order)
        chunks.append(Chunk(seq, min(seq.num_pending, budget)))
        return True


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order
