"""The adapters in the bank: decisions in plain Python, which others carry out.

An adapter is absent, or loading (its matrices are on their way to the host's memory), or held (there, without a
place in the bank), or copying (into its place), or resident. Whatever takes time happens on other threads; the
result is posted to the engine's thread, on which all of this is called.
"""

from __future__ import annotations

import itertools
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from inference_service.core.adapter import Adapter
from inference_service.engine.lora.places import Places, taken_by
from inference_service.engine.scheduling.queues import Rank
from inference_service.engine.scheduling.residents import (
    AdapterState,
    BankMemory,
    Loader,
    Presence,
    ResidencyStats,
    Residents,
    Standing,
)
from loramux_shared.access.shares import Shares
from loramux_shared.faults import Fault, ResourcesExhausted

if TYPE_CHECKING:  # which would import torch
    from inference_service.engine.lora.packed import PackedAdapter

log = structlog.get_logger()

LOADS: Final = 12
"""Adapters on their way at once, which keys share: each holds its matrices in the host's memory until it has
its place.
"""
FIRST_PAUSE_S: Final = 1.0
LAST_PAUSE_S: Final = 60.0
"""Behind the first load that failed, and behind many: nobody tries again before."""
_NEEDED_NOW: Final = 1 << 62
"""Rank of an adapter that is waited for among those that may leave: as if used after all others."""
_NOBODY: Final[Rank] = (math.inf, (0, 0))
"""Rank of an adapter that no sequence waits for."""


class Residency(Residents):
    """Brings adapters in, and lets those leave that were used longest ago.

    An adapter leaves only where no sequence is under way on it, no submitted step reads it, and it is not
    pinned; one that sequences wait for leaves only for one that is waited for more urgently. What would have no
    place even if all but the pinned ones left is a failure. A load that fails ends those who wait for it, see
    `failures`; the next request tries again after a pause.
    """

    def __init__(
        self,
        places: Places,
        num_slots: int,
        bank: BankMemory,
        loader: Loader,
        post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        wait_s: float = 0.0,
    ) -> None:
        """Begin with an empty bank; post has something called on the engine's thread.

        `bring_in` waits at most wait_s for copies, where they are so quick that nobody should miss a step.
        """
        super().__init__()
        self.stats = ResidencyStats()
        self._places = places
        self._bank = bank
        self._loader = loader
        self._post = post
        self._clock = clock
        self._wait_s = wait_s
        self._copying = 0
        self._copies: queue.SimpleQueue[tuple[Standing, Fault | None]] = queue.SimpleQueue()
        """Those that have ended."""
        self._entries: dict[Adapter, Standing] = {}
        self._packed: dict[Standing, PackedAdapter] = {}
        """Those that are held or being copied."""
        self._absent: dict[Standing, None] = {}
        """Those that are to be loaded; first come first served where ranks say nothing."""
        self._later: deque[Adapter] = deque()
        self._held: list[Standing] = []
        self._by_slot: dict[int, Standing] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._on_the_way = Shares(LOADS)
        self._uses = itertools.count(1)
        self._submitted = self._resolved = 0
        self._released: deque[tuple[int, Standing]] = deque()

    @property
    def wanting(self) -> bool:
        """Return True if `bring_in` has anything to do."""
        return bool(self._held or (self._absent and self._has_room) or self._may_prefetch)

    @property
    def settled(self) -> bool:
        """True when nothing is on its way and nothing is to be."""
        return not self._on_the_way.taken and not self._absent and not self._later

    @property
    def retry_s(self) -> float:
        """When a load that failed is to be tried again, on the clock of ``time.monotonic``; infinite: never."""
        failed = [entry for entry in self._absent if entry.fault is not None] if self._has_room else []
        return min(
            (entry.retry_s for entry in failed if self._key_in_share(entry) is not None), default=math.inf
        )

    @property
    def releasing(self) -> bool:
        """Return True if an adapter that no sequence is under way on may still be read by a step."""
        return bool(self._released)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of resident adapters in the bank."""
        return self._places.num_bytes - self._places.num_free

    @property
    def capacity(self) -> int:
        """Return the bytes of the bank."""
        return self._places.num_bytes

    def resident(self) -> list[Adapter]:
        """Return those that are in the bank."""
        return [entry.adapter for entry in self._by_slot.values() if entry.state is AdapterState.RESIDENT]

    def standing(self, adapter: Adapter) -> Standing:
        """Say what is known of an adapter; may be asked on another thread."""
        return self._entries.get(adapter) or Standing(adapter)

    def standings(self) -> list[Standing]:
        """The same of all that are resident, wanted, pinned, or failed lately."""
        return list(self._entries.values())

    def presence(self, adapter: Adapter) -> Presence:
        """Say where an adapter is."""
        if adapter.slot is not None:
            return Presence.RESIDENT
        entry = self._entries.get(adapter)
        return Presence.STARVED if entry is not None and entry.starved else Presence.ABSENT

    def refusal(self, adapter: Adapter) -> Fault | None:
        """Return why an adapter's last load failed, until it may be retried."""
        entry = self._entries.get(adapter)
        return entry.fault if entry is not None and entry.retry_s > self._clock() else None

    def want(self, adapter: Adapter, key_id: str = "") -> None:
        """Note that one more sequence, of an API key, waits for an adapter."""
        entry = self._entry(adapter)
        entry.waiting += 1
        entry.keys[key_id] += 1
        self.stats.waits += entry.state is not AdapterState.RESIDENT
        self._consider(entry)

    def unwant(self, adapter: Adapter, key_id: str = "") -> None:
        """Note that a sequence stopped waiting for it; an adapter without waiters is not loaded."""
        entry = self._entries[adapter]
        entry.waiting -= 1
        entry.keys[key_id] -= 1
        if not entry.keys[key_id]:
            del entry.keys[key_id]
        self._reconsider(entry)

    def pin(self, adapter: Adapter) -> None:
        """Keep an adapter resident from now on."""
        entry = self._entry(adapter)
        entry.pinned = True
        self._consider(entry)

    def unpin(self, adapter: Adapter) -> None:
        """Let it leave when others need its place."""
        if adapter in self._entries:
            self._entries[adapter].pinned = False
            self._reconsider(self._entries[adapter])

    def prefetch(self, adapter: Adapter) -> None:
        """Load an adapter before its first request, if there is free room."""
        entry = self._entry(adapter)
        entry.prefetched = entry.state is not AdapterState.RESIDENT
        self._consider(entry)

    def prefetch_later(self, adapters: Iterable[Adapter]) -> None:
        """The same, one after the other, while nothing else is on its way."""
        self._later.extend(adapters)

    def drop(self, adapter: Adapter) -> None:
        """Let an adapter leave now, if it may; it is not pinned, prefetched or known as failed any more."""
        entry = self._entries.get(adapter)
        if entry is not None:
            entry.pinned, entry.prefetched, entry.fault = False, False, None
            if not entry.held_fast and not entry.waiting:
                self._evict(entry)
            self._reconsider(entry)

    def acquire(self, adapter: Adapter) -> None:
        """Note that a sequence is under way on a resident adapter, which stays until it is released."""
        entry = self._entries[adapter]
        entry.in_flight += 1
        self._touch(entry)

    def release(self, adapter: Adapter) -> None:
        """Note that the sequence is not any more; steps that were submitted may read the adapter still."""
        entry = self._entries[adapter]
        entry.in_flight -= 1
        self._touch(entry)
        if self._submitted > self._resolved:
            entry.reading += 1
            self._released.append((self._submitted, entry))

    def submitted(self) -> None:
        """Note that a step was submitted."""
        self._submitted += 1

    def resolved(self, *, everything: bool = False) -> None:
        """Note that the oldest step that was submitted is over, or all are."""
        self._resolved = self._submitted if everything else self._resolved + 1
        while self._released and self._released[0][0] <= self._resolved:
            self._released.popleft()[1].reading -= 1
            self.changes += self.wanting

    def bring_in(self, ranks: Mapping[Adapter, Rank], together: Iterable[tuple[Adapter, ...]] = ()) -> None:
        """Begin loads and give places, in the order of the waiting sequences.

        Adapters that are wanted together have their ranks from the same sequence: the most urgent one gets all
        of its places before another gets one of them, so that no two keep half of what they need.
        """
        if self._absent and self._has_room:
            self._begin_loads(ranks)
        if self._may_prefetch:
            self.prefetch(self._later.popleft())
            for entry in tuple(self._absent):
                self._load(entry, "")
        for entry in sorted(self._held, key=lambda each: ranks.get(each.adapter, _NOBODY)):
            self._give_place(entry, ranks)
        groups = ([self._entries[adapter] for adapter in adapters] for adapters in together)
        lacking = next((group for group in groups if any(entry.starved for entry in group)), None)
        if lacking is not None:
            self._settle(lacking, ranks)
        if self._wait_s:
            self._end_copies(self._wait_s)

    def _begin_loads(self, ranks: Mapping[Adapter, Rank]) -> None:
        """Load absent adapters in the order of the waiting sequences, while there is room on the way."""
        now = self._clock()
        ready = [entry for entry in self._absent if entry.retry_s <= now]
        for entry in sorted(ready, key=lambda each: ranks.get(each.adapter, _NOBODY)):
            if (key_id := self._key_in_share(entry)) is not None:
                self._load(entry, key_id)
            if not self._has_room:
                break

    @property
    def _may_prefetch(self) -> bool:
        return bool(self._later) and not self._on_the_way.taken and not self._absent

    @property
    def _has_room(self) -> bool:
        return self._on_the_way.taken < LOADS

    def _key_in_share(self, entry: Standing) -> str | None:
        """Return an API key that waits for an adapter and has a share left for its load; None: no key has."""
        return next(filter(self._on_the_way.may_take, entry.keys or ("",)), None)

    def _entry(self, adapter: Adapter) -> Standing:
        return self._entries.setdefault(adapter, Standing(adapter))

    def _touch(self, entry: Standing) -> None:
        entry.used, entry.last_used_s = next(self._uses), self._clock()

    def _is_wanted(self, entry: Standing) -> bool:
        return bool(entry.waiting or entry.pinned or entry.prefetched)

    def _consider(self, entry: Standing) -> None:
        self.changes += 1
        if entry.state is AdapterState.ABSENT:
            self._absent[entry] = None

    def _reconsider(self, entry: Standing) -> None:
        """Forget what was wanted and is not any more; another may find its place."""
        if not self._is_wanted(entry):
            if entry.state is AdapterState.HELD:
                self._let_fall(entry)
            if entry.state is AdapterState.ABSENT:
                self._absent.pop(entry, None)
                if entry.fault is None:
                    self._entries.pop(entry.adapter, None)
        self.changes += self.wanting

    def _load(self, entry: Standing, key_id: str) -> None:
        del self._absent[entry]
        entry.state, entry.key_id = AdapterState.LOADING, key_id
        entry.began_s = self._clock()
        self._on_the_way.take(key_id)
        self._loader.load(
            entry.adapter, lambda packed, tier: self._post(partial(self._loaded, entry, packed, tier))
        )

    def _loaded(self, entry: Standing, packed: PackedAdapter | Fault, tier: str) -> None:
        if isinstance(packed, Fault):
            self._fail(entry, packed)
            return
        self.stats.loads_by_tier[tier] += 1
        self.changes += 1
        entry.state, self._packed[entry], entry.num_bytes = AdapterState.HELD, packed, packed.num_bytes
        self._held.append(entry)
        self._reconsider(entry)

    def _give_place(self, entry: Standing, ranks: Mapping[Adapter, Rank]) -> None:
        rank = ranks.get(entry.adapter, _NOBODY)
        alone = entry.prefetched and not entry.waiting and not entry.pinned
        ages = {} if alone else self._ages(rank, ranks)
        try:
            spot = self._places.find(entry.num_bytes, ages.get)
            if spot is None and not alone:
                self._require_room_without_pins(entry)
        except Fault as fault:
            self._fail(entry, fault)
            return
        leaving = list(spot.leaving) if spot is not None else []
        if spot is not None and not self._free_slots and not leaving:
            oldest = min(ages, key=lambda slot: ages[slot], default=None)
            spot, leaving = (None, []) if oldest is None else (spot, [oldest])
        if spot is None:
            entry.starved = True
            if alone:
                entry.prefetched = False
                self._reconsider(entry)
            return
        for slot in leaving:
            self._evict(self._by_slot[slot])
        self._copy(entry, spot.offset)

    def _ages(self, rank: Rank, ranks: Mapping[Adapter, Rank]) -> dict[int, int]:
        """When those were used that may leave for one that is waited for with a rank; by their slots."""
        free = [entry for entry in self._by_slot.values() if not entry.held_fast]
        ages = {entry.slot: entry.used for entry in free if not entry.waiting}
        waited = [entry for entry in free if entry.waiting and ranks.get(entry.adapter, _NOBODY) > rank]
        waited.sort(key=lambda entry: ranks.get(entry.adapter, _NOBODY), reverse=True)
        return ages | {entry.slot: _NEEDED_NOW + place for place, entry in enumerate(waited)}

    def _require_room_without_pins(self, entry: Standing) -> None:
        """Raise where only pinned adapters are in the way, so that waiting would not help."""

        def age(slot: int) -> int | None:
            return None if self._by_slot[slot].pinned else 0

        if self._places.find(entry.num_bytes, age) is None:
            raise ResourcesExhausted(
                f"an adapter of {entry.num_bytes:,} bytes does not fit the bank of {self.capacity:,} "
                "bytes beside the pinned ones. Unpin some, or raise LORAMUX_ADAPTER_MEMORY_GB."
            )

    def _settle(self, group: list[Standing], ranks: Mapping[Adapter, Rank]) -> None:
        """See to adapters that are wanted together and lack places.

        They are a failure where they would have none even if all but the pinned ones left. Where nobody is in
        the way who must stay, they lie somewhere in the midst: all leave, and come back side by side.
        """
        inside = set(group)
        stay = {entry.slot: entry for entry in self._by_slot.values() if entry.pinned}
        needed = sum(taken_by(entry.num_bytes) for entry in group if entry.slot not in stay)
        room = self._places.largest(lambda slot: None if slot in stay else 0)
        slots = len(self._by_slot) + len(self._free_slots) - len(stay)
        if needed > room or len(inside) > slots + sum(entry in inside for entry in stay.values()):
            self.failures.append(
                (tuple(entry.adapter for entry in group), _no_room(needed, room, len(group), slots))
            )
            return
        rank = max(ranks.get(entry.adapter, _NOBODY) for entry in group)
        movable = [entry for entry in self._by_slot.values() if not entry.pinned]
        ages = self._ages(rank, ranks)
        if all(entry.slot in ages or (entry in inside and not entry.held_fast) for entry in movable):
            for entry in movable:
                self._evict(entry)

    def _copy(self, entry: Standing, offset: int) -> None:
        entry.slot, entry.offset = self._free_slots.pop(), offset
        self._by_slot[entry.slot] = entry
        self._places.take(entry.slot, offset, entry.num_bytes)
        self._held.remove(entry)
        entry.state, entry.starved = AdapterState.COPYING, False
        self._copying += 1

        def done(fault: Fault | None) -> None:
            self._copies.put((entry, fault))
            self._post(self._end_copies)

        self._loader.run(partial(self._bank.copy, self._packed[entry], offset), done)

    def _end_copies(self, wait_s: float = 0.0) -> None:
        """Take in what was copied, or is within so many seconds."""
        until_s = time.monotonic() + wait_s
        with suppress(queue.Empty):
            while self._copying:
                left_s = until_s - time.monotonic()
                ended = self._copies.get(timeout=left_s) if left_s > 0 else self._copies.get_nowait()
                self._copying -= 1
                self._copied(*ended)

    def _copied(self, entry: Standing, fault: Fault | None) -> None:
        if fault is None:
            try:
                self._bank.enter(entry.slot, entry.offset, self._packed[entry])
            except Fault as refusal:
                fault = refusal
        if fault is not None:
            self._vacate(entry)
            self._fail(entry, fault)
            return
        del self._packed[entry]
        entry.state, entry.adapter.slot = AdapterState.RESIDENT, entry.slot
        self.changes += 1
        entry.fault, entry.pause_s, entry.retry_s, entry.prefetched = None, 0.0, -math.inf, False
        self._touch(entry)
        self._on_the_way.give_back(entry.key_id)
        self.stats.loaded(self._clock() - entry.began_s)

    def _evict(self, entry: Standing) -> None:
        """Take a resident adapter's place away; sequences that wait for it wait for its load again."""
        self.changes += 1
        entry.adapter.slot = None
        self._bank.leave(entry.slot)
        self._vacate(entry)
        entry.state = AdapterState.ABSENT
        self.stats.evictions += 1
        if self._is_wanted(entry):
            self._consider(entry)
        else:
            self._reconsider(entry)

    def _vacate(self, entry: Standing) -> None:
        self._places.give_back(entry.slot)
        del self._by_slot[entry.slot]
        self._free_slots.append(entry.slot)
        entry.slot = -1

    def _let_fall(self, entry: Standing) -> None:
        """Forget the matrices of an adapter on its way."""
        if entry in self._held:
            self._held.remove(entry)
        self.changes += 1
        self._packed.pop(entry, None)
        entry.state, entry.starved = AdapterState.ABSENT, False
        self._on_the_way.give_back(entry.key_id)

    def _fail(self, entry: Standing, fault: Fault) -> None:
        """Note why a load failed; sequences that wait for it end, and a retry waits for a while."""
        self._let_fall(entry)
        fault = fault.copy()
        entry.fault, entry.prefetched = fault, False
        entry.pause_s = min(max(FIRST_PAUSE_S, 2 * entry.pause_s), LAST_PAUSE_S)
        entry.retry_s = self._clock() + entry.pause_s
        self.stats.failures += 1
        self.failures.append(((entry.adapter,), fault))
        if entry.pinned:
            self._consider(entry)
        log.warning(
            "adapter cannot be loaded",
            digest=entry.adapter.digest[:12],
            reason=fault.reason,
            problem=str(fault),
        )


def _no_room(needed: int, room: int, adapters: int, slots: int) -> ResourcesExhausted:
    return ResourcesExhausted(
        f"{adapters} adapters of {needed:,} bytes do not fit together: the bank has {room:,} bytes in one "
        f"piece and {slots:,} slots beside the pinned ones. Ask for fewer at once, unpin some, or raise "
        "LORAMUX_ADAPTER_MEMORY_GB."
    )
