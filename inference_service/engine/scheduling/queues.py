"""Scheduling queues, and a step while it is put together from them.

Queues are served in turns by the tokens that they had, and within a queue by priority, then arrival.
Virtual token counters: "Fairness in Serving Large Language Models", Sheng et al., OSDI 2024. A queue's counter
grows by the rows that are computed for it, divided by its weight, and the queue with the smallest comes first.
One that had nothing to do begins at the smallest counter of those that are served: an idle queue saves up
nothing.
"""

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

from inference_service.core.adapter import Adapter
from inference_service.core.sequence import FAIR, Batch, Chunk, Sequence, Share
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.step_times import (
    MAX_BRIEF_STEP_RATIO,
    MAX_BRIEF_TOKENS,
    MAX_STEP_RATIO,
    StepLoad,
    StepTimes,
)

Key = tuple[str, tuple[Adapter, ...]]
Rank = tuple[float, tuple[int, int]]
"""Counter, then priority and arrival of who waits first: the smaller comes first."""
FIRST_BACKGROUND_COUNTER: Final = 2.0**40
"""Counter at which queues of the background begin: behind all others, and far enough ahead to make room."""
MAX_IDLE_COUNTERS: Final = 4096
"""Counters of idle queues that are kept, as far as they are ahead of the others."""


@dataclass(eq=False)
class SequenceQueue:
    """The sequences of one flow on the same adapters."""

    flow: str
    adapters: tuple[Adapter, ...]
    """None for the base, several for mixtures of them, whatever their scales."""
    served: float
    """Tokens that were computed for it, by weight."""
    share: Share = FAIR
    is_new: bool = False
    """True if nothing was computed for it since it came, and it is not ahead of the others from before."""
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    """Running sequences, ordered like the waiting ones: by priority, then by arrival."""
    by_length: list[Sequence] = field(default_factory=list)
    """Waiting sequences, the most urgent first, then by the length of their prompts."""

    @property
    def rank(self) -> Rank:
        """Return the rank of a queue with a waiting sequence."""
        return self.served, self.waiting[0].order

    @property
    def resident(self) -> bool:
        """Return True if all of its adapters are in the bank."""
        return all(adapter.slot is not None for adapter in self.adapters)


class SequenceQueues:
    """All queues that have sequences."""

    def __init__(self) -> None:
        self.uncounted: set[SequenceQueue] = set()
        """Queues that wait for adapters to arrive: their counters restart then."""
        self.new: dict[SequenceQueue, None] = {}
        """New queues that can be served, in the order of their arrival."""
        self.lowest = math.inf
        """Lower bound of the counters of waiting queues that can be served; see `look_through`."""
        self.active: Counter[Adapter] = Counter()
        """Running sequences, by adapter."""
        self.running_queues: dict[SequenceQueue, None] = {}
        """Queues with running sequences."""
        self.in_background = 0
        """Sequences of the background."""
        self._smallest: dict[bool, float] = {}
        """Last results of `_least`, by whether they are of the background; empty when counters changed."""
        self._queues: dict[Key, SequenceQueue] = {}
        self.of: dict[Sequence, SequenceQueue] = {}
        """The queue that each sequence is in."""
        self._by_adapter: defaultdict[Adapter | None, dict[SequenceQueue, None]] = defaultdict(dict)
        self._running: Counter[str] = Counter()
        """Running sequences, by flow."""
        self._ahead: dict[Key, float] = {}

    def __iter__(self) -> Iterator[SequenceQueue]:
        """Over a copy, for another thread may ask."""
        return iter(tuple(self._queues.values()))

    @property
    def waiting(self) -> Iterator[SequenceQueue]:
        """The queues with a waiting sequence."""
        return (queue for queue in self._queues.values() if queue.waiting)

    def joining(self) -> list[SequenceQueue]:
        """Return the queues with a waiting sequence whose adapters are all under way."""
        found = (self._by_adapter.get(adapter, ()) for adapter in (None, *self.active))
        waiting = [queue for queue in chain.from_iterable(found) if queue.waiting]
        joining = (queue for queue in waiting if all(adapter in self.active for adapter in queue.adapters))
        return list(dict.fromkeys(joining))

    def look_through(self) -> list[SequenceQueue]:
        """Return the queues with a waiting sequence that can be served, and note their smallest counter."""
        ready = [queue for queue in self.waiting if queue not in self.uncounted]
        self.lowest = min((queue.served for queue in ready), default=math.inf)
        return ready

    @property
    def in_foreground(self) -> bool:
        """True if sequences that are not of the background are under way, or can begin."""
        return any(not queue.share.background for queue in self.running_queues) or self.foreground_waits

    @property
    def foreground_waits(self) -> bool:
        """True if a sequence that waits is not of the background, and can begin."""
        return any(not queue.share.background and queue.resident for queue in self.waiting)

    def add(self, seq: Sequence) -> SequenceQueue:
        """Add a waiting sequence to its queue."""
        key = seq.flow, seq.adapters
        queue = self._queues.get(key)
        if queue is None:
            ahead, least = self._ahead.pop(key, 0.0), self._least(background=seq.share.background)
            queue = self._queues[key] = SequenceQueue(*key, max(ahead, least), is_new=ahead <= least)
            for adapter in queue.adapters or (None,):
                self._by_adapter[adapter][queue] = None
            if not queue.resident:
                self.uncounted.add(queue)
            elif queue.is_new:
                self.new[queue] = None
        queue.share = seq.share
        self.in_background += seq.share.background
        self.of[seq] = queue
        self._wait(queue, seq)
        return queue

    def remove(self, seq: Sequence) -> SequenceQueue:
        """Remove a sequence from its queue, and the queue with its last one."""
        queue = self.of.pop(seq)
        self.in_background -= seq.share.background
        if not self._end(queue, seq):
            _leave(queue, seq)
        if not queue.running and not queue.waiting:
            self._forget(queue)
        return queue

    def start(self, seq: Sequence) -> None:
        """Move a sequence from those that wait to those that are under way."""
        queue = self.of[seq]
        _leave(queue, seq)
        bisect.insort(queue.running, seq, key=order)
        self._running[queue.flow] += 1
        self.running_queues[queue] = None
        self.active.update(queue.adapters)

    def stop(self, seq: Sequence) -> None:
        """Let a sequence wait again."""
        queue = self.of[seq]
        self._end(queue, seq)
        self._wait(queue, seq)

    def count(self, queue: SequenceQueue, *, counted: bool) -> None:
        """Note whether a queue can be served; the counter of one that could not be restarts when it can."""
        if not counted and queue not in self.uncounted:
            self.uncounted.add(queue)
            self.new.pop(queue, None)
            self.changed()
        elif counted and queue in self.uncounted:
            queue.served = max(queue.served, self._least(background=queue.share.background))
            self.uncounted.remove(queue)
            if queue.is_new:
                self.new[queue] = None
            self.lowest = min(self.lowest, queue.served)

    def charge(self, queue: SequenceQueue, rows: int) -> None:
        """Note rows that were computed for a queue."""
        queue.served += rows / queue.share.weight
        if queue.is_new:
            queue.is_new = False
            self.new.pop(queue, None)

    def changed(self) -> None:
        """Note that counters grew."""
        self._smallest.clear()

    def is_full(self, queue: SequenceQueue) -> bool:
        """Return True if as many sequences of its share are under way, on any adapter, as it allows."""
        most = queue.share.max_running
        return most is not None and self._running[queue.flow] >= most

    def _end(self, queue: SequenceQueue, seq: Sequence) -> bool:
        if not take(queue.running, seq):
            return False
        _one_less(self._running, queue.flow)
        for adapter in queue.adapters:
            _one_less(self.active, adapter)
        if not queue.running:
            del self.running_queues[queue]
        return True

    def _wait(self, queue: SequenceQueue, seq: Sequence) -> None:
        bisect.insort(queue.waiting, seq, key=order)
        bisect.insort(queue.by_length, seq, key=_length)
        if queue not in self.uncounted:
            self.lowest = min(self.lowest, queue.served)

    def _least(self, *, background: bool = False) -> float:
        """The smallest counter of those that can be served; where all of them begin when there are none."""
        if background not in self._smallest:
            counted = (queue for queue in self._queues.values() if queue not in self.uncounted)
            counters = [queue.served for queue in counted if queue.share.background == background]
            if not counters:
                return FIRST_BACKGROUND_COUNTER if background else 0.0
            self._smallest[background] = min(counters)
        return self._smallest[background]

    def _forget(self, queue: SequenceQueue) -> None:
        key = queue.flow, queue.adapters
        del self._queues[key]
        if queue.served in self._smallest.values():
            self.changed()
        self.uncounted.discard(queue)
        self.new.pop(queue, None)
        for adapter in queue.adapters or (None,):
            del self._by_adapter[adapter][queue]
            if not self._by_adapter[adapter]:
                del self._by_adapter[adapter]
        if not self._queues:
            self._ahead.clear()  # no other queue is there to compare with
            return
        self._ahead[key] = queue.served
        if len(self._ahead) > MAX_IDLE_COUNTERS:
            least = self._least()
            ahead = sorted(self._ahead.items(), key=lambda item: item[1])[MAX_IDLE_COUNTERS // 2 :]
            self._ahead = {key: served for key, served in ahead if served > least}


def order(seq: Sequence) -> tuple[int, int]:
    """Return the order within a queue: priority, then arrival."""
    return seq.order


def take(ordered: list[Sequence], seq: Sequence, key: Callable[[Sequence], Any] = order) -> bool:
    """Take a sequence out of where it may be."""
    place = bisect.bisect_left(ordered, key(seq), key=key)
    found = place < len(ordered) and ordered[place] is seq
    if found:
        del ordered[place]
    return found


def _length(seq: Sequence) -> tuple[int, int, int]:
    return -seq.priority, seq.num_prompt, seq.progress.arrival


def _leave(queue: SequenceQueue, seq: Sequence) -> None:
    take(queue.waiting, seq)
    take(queue.by_length, seq, _length)


def _one_less(counts: Counter[Any], key: object) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


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
    whole: bool = False
    """True if one step computes all of a prompt, as an encoder must; each fits a step."""
    part_s: float = math.inf
    """Seconds after which a step pauses for prompts that are far shorter; infinite where none does."""
    prefill_first: bool = False
    """True if steps with prompts need not be short for sequences that decode."""

    def end(self, seq: Sequence) -> int:
        """Return the tokens of prompt and answer at which a sequence ends."""
        return min(seq.num_prompt + seq.sampling.max_tokens, self.max_seq_len)


@dataclass
class Plan:
    """The content of a step so far, and the rest of its budget."""

    budget: int
    """Rows that are left."""
    step_times: StepTimes
    seconds: float = math.inf
    """Seconds that are left for prompts."""
    lengths: dict[Sequence, int] = field(default_factory=dict)
    prompts: list[Sequence] = field(default_factory=list)
    """Under way when the step began, or admitted into it; in the order of those under way."""
    preempted: set[Sequence] = field(default_factory=set)
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    drafting_s: float = 0.0
    """Seconds that a draft model took for them."""
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
    has_foreground: bool = False
    """True if sequences of the background stand behind others."""
    spare_s: float = 0.0
    """Seconds by which sequences of the background may lengthen it."""
    admits_background: bool = True
    """True if prompts of the background may have rows."""
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
        seconds = self.step_times.room_s(decodes, MAX_BRIEF_STEP_RATIO if self.brief else MAX_STEP_RATIO)
        self.budget, self.seconds = (0, 0.0) if seconds is None else (self.budget, seconds)

    def begin(self, seq: Sequence) -> None:
        """Take in a prompt that was admitted; beside one that is not brief, prompts have less of the step."""
        self.prompts.append(seq)
        if self.brief and not _is_brief(seq):
            self.brief = False
            more_s, less_s = (
                self.step_times.room_s(self.decodes, times) for times in (MAX_BRIEF_STEP_RATIO, MAX_STEP_RATIO)
            )
            self.seconds -= (more_s or 0.0) - (less_s or 0.0)

    def fitting(self, seq: Sequence) -> int:
        """Rows of a prompt that find room, beside those that it has."""
        granted = self.lengths.get(seq, 0)
        rows = self.step_times.rows(seq.progress.num_computed + granted, self.seconds)
        return int(min(self.left(seq), self.budget, rows))

    def whole(self, seq: Sequence) -> int:
        """Rows of a prompt that one step must compute: all, or none; the first one takes the time it needs."""
        left = self.left(seq)
        return left if self.fits(seq) or (not self.lengths and left <= self.budget) else 0

    def fits(self, seq: Sequence) -> bool:
        """Return True if all rows of a prompt find room."""
        return self.fitting(seq) == self.left(seq)

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
        drafted = sum(map(len, self.drafts.values()))
        return StepLoad(len(self.lengths) - len(chunks), rows, area, drafted, self.drafting_s)

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
    return seq.num_prompt - seq.progress.num_cached <= MAX_BRIEF_TOKENS
