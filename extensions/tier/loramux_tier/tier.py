"""The choice of the blocks that are in slower memory, and of those that are copied there and back."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Protocol

import structlog

log = structlog.get_logger()


class Slots(Protocol):
    """Slower memory, in slots of a block each."""

    count: int
    slot_bytes: int

    def write(self, blocks: Mapping[int, int]) -> None:
        """Fill slots from blocks of the cache, which each is given with."""
        ...

    def read(self, slots: Mapping[int, int]) -> None:
        """Fill blocks of the cache from slots, which each is given with."""
        ...


class Tier:
    """The blocks that left a pool, least recently used first, as `inference_service.engine.blocks.Tier` says.

    A block that is copied back stays here too, so that it is copied out once however often it leaves the cache.
    Until the copies are made, blocks of the cache hold what they held before the step. All slots are written
    before any is read, and none that is read is written, since its key is held.
    """

    def __init__(self, memory: Slots) -> None:
        self.stored = self.restored = 0
        self._memory = memory
        self._free = list(reversed(range(memory.count)))
        self._slots: OrderedDict[int, int] = OrderedDict()
        """Slots by key."""
        self._held: set[int] = set()
        """Keys that are read from before the next step."""
        self._dropped: list[int] = []
        """Slots of those among them that were forgotten."""
        self._writes: dict[int, int] = {}
        """Blocks by slot."""
        self._reads: dict[int, int] = {}
        """Slots by block."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the blocks that it has."""
        return len(self._slots) * self._memory.slot_bytes

    def __contains__(self, key: int) -> bool:
        return key in self._slots

    def store(self, key: int, block: int) -> None:
        """Take in what a block holds now, in the place of the least recently used one."""
        if key in self._slots:
            self._slots.move_to_end(key)
            return
        if not self._free:
            oldest = next(iter(self._slots), None)
            if oldest is None or oldest in self._held:
                return
            self.forget(oldest)
        self._slots[key] = self._free.pop()
        self._writes[self._slots[key]] = block
        self.stored += 1

    def hold(self, keys: Iterable[int]) -> None:
        """Keep blocks that it has until the copies are made."""
        for key in keys:
            self._slots.move_to_end(key)
            self._held.add(key)

    def restore(self, key: int, block: int) -> None:
        """Give a block what is known by a key that is held."""
        self._reads[block] = self._slots[key]
        self.restored += 1

    def forget(self, key: int) -> None:
        """Drop the block with a key, if there is one."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            (self._dropped if key in self._held else self._free).append(slot)

    def forget_all(self) -> None:
        """Drop all blocks, and make no copies."""
        self._free += [*self._slots.values(), *self._dropped]
        for each in (self._slots, self._held, self._dropped, self._writes, self._reads):
            each.clear()

    def move(self) -> None:
        """Make the copies.

        Raises:
            OSError: blocks that sequences count on could not be read. Nothing is kept from then on.
        """
        try:
            if self._writes:
                self._memory.write(self._writes)
            if self._reads:
                self._memory.read(self._reads)
        except OSError as error:
            log.exception("blocks that leave the cache are no longer kept: their file failed", why=str(error))
            needed = bool(self._reads)
            self.forget_all()
            self._free.clear()
            if needed:
                raise
        self._free += self._dropped
        for each in (self._held, self._dropped, self._writes, self._reads):
            each.clear()
