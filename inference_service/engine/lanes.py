"""Scheduling queues: served in turns by the tokens that they had, and within a queue by priority, then arrival.

Virtual token counters: "Fairness in Serving Large Language Models", Sheng et al., OSDI 2024. A queue's counter
grows by the rows that are computed for it, divided by its weight, and the queue with the smallest comes first.
One that had nothing to do begins at the smallest counter of those that are served: an idle queue saves up
nothing.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

from inference_service.core.adapter import Adapter
from inference_service.core.sequence import FAIR, Sequence, Share

Key = tuple[str, tuple[Adapter, ...]]
Rank = tuple[float, tuple[int, int]]
"""Counter, then priority and arrival of who waits first: the smaller comes first."""
MOST_REMEMBERED: Final = 4096
"""Counters of idle queues that are kept, as far as they are ahead of the others."""


@dataclass(eq=False)
class Lane:
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
    """Both in their order."""
    by_length: list[Sequence] = field(default_factory=list)
    """Those that wait, the most urgent first, then those of the shortest prompts."""

    @property
    def rank(self) -> Rank:
        """Return the rank of a queue with a waiting sequence."""
        return self.served, self.waiting[0].order

    @property
    def resident(self) -> bool:
        """Return True if all of its adapters are in the bank."""
        return all(adapter.slot is not None for adapter in self.adapters)


class Lanes:
    """All queues that have sequences."""

    def __init__(self) -> None:
        self.uncounted: set[Lane] = set()
        """Queues that wait for adapters to arrive: their counters restart then."""
        self.new: dict[Lane, None] = {}
        """Those that are new and can be served, in the order in which they came."""
        self.lowest = math.inf
        """No counter of those that wait and can be served is smaller; see `look_through`."""
        self.active: Counter[Adapter] = Counter()
        """Sequences under way, by adapter."""
        self.under_way: dict[Lane, None] = {}
        """Queues that have some."""
        self._smallest: float | None = None
        """Last result of `_least`, while it holds."""
        self._lanes: dict[Key, Lane] = {}
        self._of: dict[Sequence, Lane] = {}
        self._by_adapter: defaultdict[Adapter | None, dict[Lane, None]] = defaultdict(dict)
        self._running: Counter[str] = Counter()
        """Sequences under way, by flow."""
        self._ahead: dict[Key, float] = {}

    def __iter__(self) -> Iterator[Lane]:
        """Over a copy, for another thread may ask."""
        return iter(tuple(self._lanes.values()))

    @property
    def waiting(self) -> Iterator[Lane]:
        """Those in which somebody waits."""
        return (lane for lane in self._lanes.values() if lane.waiting)

    def joining(self) -> list[Lane]:
        """Return the queues with a waiting sequence whose adapters are all under way."""
        found = (self._by_adapter.get(adapter, ()) for adapter in (None, *self.active))
        waiting = [lane for lane in chain.from_iterable(found) if lane.waiting]
        joining = (
            lane for lane in waiting if len(lane.adapters) < 2 or self.active.keys() >= set(lane.adapters)
        )
        return list(dict.fromkeys(joining))

    def look_through(self) -> list[Lane]:
        """Return all in which somebody waits who can be served, and note the smallest counter among them."""
        ready = [lane for lane in self.waiting if lane not in self.uncounted]
        self.lowest = min((lane.served for lane in ready), default=math.inf)
        return ready

    def of(self, seq: Sequence) -> Lane:
        """Return the queue that a sequence is in."""
        return self._of[seq]

    def add(self, seq: Sequence) -> Lane:
        """Add a waiting sequence to its queue."""
        key = seq.flow, seq.adapters
        lane = self._lanes.get(key)
        if lane is None:
            ahead, least = self._ahead.pop(key, 0.0), self._least()
            lane = self._lanes[key] = Lane(*key, max(ahead, least), is_new=ahead <= least)
            for adapter in lane.adapters or (None,):
                self._by_adapter[adapter][lane] = None
            if not lane.resident:
                self.uncounted.add(lane)
            elif lane.is_new:
                self.new[lane] = None
        lane.share = seq.share
        self._of[seq] = lane
        self._wait(lane, seq)
        return lane

    def remove(self, seq: Sequence) -> Lane:
        """Remove a sequence from its queue, and the queue with its last one."""
        lane = self._of.pop(seq)
        if not self._end(lane, seq):
            _leave(lane, seq)
        if not lane.running and not lane.waiting:
            self._forget(lane)
        return lane

    def start(self, seq: Sequence) -> None:
        """Move a sequence from those that wait to those that are under way."""
        lane = self.of(seq)
        _leave(lane, seq)
        bisect.insort(lane.running, seq, key=order)
        self._running[lane.flow] += 1
        self.under_way[lane] = None
        self.active.update(lane.adapters)

    def stop(self, seq: Sequence) -> None:
        """Let a sequence wait again."""
        lane = self.of(seq)
        self._end(lane, seq)
        self._wait(lane, seq)

    def count(self, lane: Lane, *, counted: bool) -> None:
        """Note whether a queue can be served; the counter of one that could not be restarts when it can."""
        if not counted and lane not in self.uncounted:
            self.uncounted.add(lane)
            self.new.pop(lane, None)
            self.changed()
        elif counted and lane in self.uncounted:
            lane.served = max(lane.served, self._least())
            self.uncounted.remove(lane)
            if lane.is_new:
                self.new[lane] = None
            self.lowest = min(self.lowest, lane.served)

    def charge(self, lane: Lane, rows: int) -> None:
        """Note rows that were computed for a queue."""
        lane.served += rows / lane.share.weight
        if lane.is_new:
            lane.is_new = False
            self.new.pop(lane, None)

    def changed(self) -> None:
        """Note that counters grew."""
        self._smallest = None

    def is_full(self, lane: Lane) -> bool:
        """Return True if as many sequences of its share are under way, on any adapter, as it allows."""
        most = lane.share.max_running
        return most is not None and self._running[lane.flow] >= most

    def _end(self, lane: Lane, seq: Sequence) -> bool:
        if not take(lane.running, seq):
            return False
        _one_less(self._running, lane.flow)
        for adapter in lane.adapters:
            _one_less(self.active, adapter)
        if not lane.running:
            del self.under_way[lane]
        return True

    def _wait(self, lane: Lane, seq: Sequence) -> None:
        bisect.insort(lane.waiting, seq, key=order)
        bisect.insort(lane.by_length, seq, key=_length)
        if lane not in self.uncounted:
            self.lowest = min(self.lowest, lane.served)

    def _least(self) -> float:
        """The smallest counter of those that can be served; where all of them begin when there are none."""
        if self._smallest is None:
            counters = (lane.served for lane in self._lanes.values() if lane not in self.uncounted)
            self._smallest = min(counters, default=None)
        return self._smallest or 0.0

    def _forget(self, lane: Lane) -> None:
        key = lane.flow, lane.adapters
        del self._lanes[key]
        if lane.served == self._smallest:
            self.changed()
        self.uncounted.discard(lane)
        self.new.pop(lane, None)
        for adapter in lane.adapters or (None,):
            del self._by_adapter[adapter][lane]
            if not self._by_adapter[adapter]:
                del self._by_adapter[adapter]
        if not self._lanes:
            self._ahead.clear()  # nobody is there to be ahead of
            return
        self._ahead[key] = lane.served
        if len(self._ahead) > MOST_REMEMBERED:
            least = self._least()
            ahead = sorted(self._ahead.items(), key=lambda item: item[1])[MOST_REMEMBERED // 2 :]
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


def _leave(lane: Lane, seq: Sequence) -> None:
    take(lane.waiting, seq)
    take(lane.by_length, seq, _length)


def _one_less(counts: Counter[Any], key: object) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
