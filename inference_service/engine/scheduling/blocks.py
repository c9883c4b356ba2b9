"""The memory of a cache: blocks by group of layers, keys by which prefixes are found, and slots for states.

A key is ``hash(parent hash, the tokens of a block)``. The parent of a first block is the adapter's digest with
the cache salt, so that keys and values, and states, of another version are never met, and those of an adapter
that left and came back are found again. Blocks before an activated adapter acts are the base's own; digest and
position are part of the first one behind them.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b
from itertools import cycle
from typing import Final

from inference_service.core.sequence import GONE, NEVER, NOWHERE, Sequence

KEY_BYTES: Final = 16


@dataclass(frozen=True)
class BlockUse:
    """The blocks of a group of layers, each in one of three states."""

    held: Mapping[int, int]
    """Blocks of sequences, with the number of sequences that hold each."""
    cached: frozenset[int]
    """Blocks that nobody holds, whose prefixes are found until they are handed out again."""
    free: frozenset[int]
    """Blocks that nobody holds, and whose content is found by nobody."""


@dataclass(frozen=True)
class StateUse:
    """The slots of recurrent states that no sequence has."""

    cached: tuple[int, ...]
    """Slots with snapshots of prefixes, the least recently used first."""
    free: frozenset[int]
    """Slots whose content is found by nobody."""


class BlockPool:
    """Hands out blocks.

    Invariant: every block is held (reference count > 0), or free; a free block that holds a known prefix stays
    findable until it is handed out again, least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.releases = 0
        """Number of times that a block became free."""
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_key: dict[int, int] = {}
        self._key_of: dict[int, int] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._by_key

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def inspect(self) -> BlockUse:
        """Return what each block is used for."""
        held = {block: refs for block, refs in enumerate(self._refs) if refs}
        cached = frozenset(self._free.keys() & self._key_of.keys())
        return BlockUse(held, cached, frozenset(self._free) - cached)

    def hold(self, key: int) -> int:
        """Hold the block that is known by a key, and return it."""
        block = self._by_key[key]
        if not self._refs[block]:
            del self._free[block]
        self._refs[block] += 1
        return block

    def take(self) -> int:
        """Hold a free block, the first to be forgotten, and return it."""
        block, _ = self._free.popitem(last=False)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._by_key[key]
        self._refs[block] = 1
        return block

    def note(self, key: int, block: int) -> None:
        """Let a held block be found by a key from now on, unless another one that is held is."""
        known = self._by_key.get(key)
        if known is not None:
            if self._refs[known]:
                return
            del self._key_of[known]
            self._free.move_to_end(known, last=False)
        self._by_key[key] = block
        self._key_of[block] = key

    def release(self, block: int) -> None:
        """Hold a block once less; one that nobody can find is the next to be handed out."""
        self._refs[block] -= 1
        if not self._refs[block]:
            self.releases += 1
            self._free[block] = None
            if block not in self._key_of:
                self._free.move_to_end(block, last=False)

    def forget(self, key: int) -> None:
        """Remove the block with a key, if there is one, from later look-ups."""
        block = self._by_key.pop(key, None)
        if block is not None:
            del self._key_of[block]
            if not self._refs[block]:
                self._free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """Let no block be found any more."""
        self._by_key.clear()
        self._key_of.clear()


class BlockGroup:
    """The blocks of the layers of one window; None sees everything.

    A table is in the order of the tokens. Of layers with a window it has GONE in the place of blocks that no
    later row sees: they were given back, or never taken.
    """

    def __init__(self, num_blocks: int, block_size: int, window: int | None = None) -> None:
        self.pool = BlockPool(num_blocks)
        self.window = window
        self._block_size = block_size

    def first_seen(self, position: int) -> int:
        """The first block that rows from a position on see."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self._block_size

    def longest(self, seq: Sequence, most: int) -> int:
        """Leading blocks, most at most, behind which rows find everything that they see."""
        if self.window is None:
            return next((index for index in range(most) if not self.knows(seq, index)), most)
        length = most
        for index in range(most - 1, -1, -1):
            if not self.knows(seq, index):
                length = index
            elif index <= self.first_seen(length * self._block_size):
                return length
        return length

    def knows(self, seq: Sequence, index: int) -> bool:
        """Return True if the block at a place of a sequence can be found."""
        return prefix_key(seq, index, self._block_size) in self.pool

    def hold(self, seq: Sequence, table: array[int], count: int) -> None:
        """Let a sequence without blocks have those of its leading ``count`` that rows behind them see."""
        first = self.first_seen(count * self._block_size)
        table.extend([GONE] * first)
        for index in range(first, count):
            table.append(self.pool.hold(prefix_key(seq, index, self._block_size)))

    def to_give(self, spare: float | None) -> int:
        """Blocks that are free, without a part of all that must stay so, one at least; None: all are."""
        rest = 0 if spare is None else max(1, int(spare * self.pool.num_blocks))
        return self.pool.num_free - rest

    def grow(self, table: array[int], missing: int) -> None:
        """Take so many blocks more."""
        for _ in range(missing):
            table.append(self.pool.take())

    def leave_behind(self, table: array[int], position: int) -> None:
        """Give back the blocks that no row from a position on sees."""
        behind = self.first_seen(position)
        first = behind
        while first and table[first - 1] != GONE:
            first -= 1
        for index in range(first, behind):
            self.pool.release(table[index])
            table[index] = GONE

    def release(self, table: array[int]) -> None:
        """Give all blocks of a table back; its tail is reused first, its beginning last."""
        for block in reversed(table):
            if block != GONE:
                self.pool.release(block)
        del table[:]


def prefix_key(seq: Sequence, index: int, block_size: int) -> int:
    """The key of the first ``index + 1`` blocks of a sequence; it keeps it, for its tokens only become more."""
    known = seq.progress.hashes
    begins = seq.invocation // block_size if seq.invocation else None
    while len(known) <= index:
        parent = known[-1] if known else _seed(seq)
        if len(known) == begins and seq.adapter is not None:
            parent = _digest(f"{parent}:{seq.adapter.digest}:{seq.invocation}".encode())
        tokens = seq.progress.tokens[len(known) * block_size : (len(known) + 1) * block_size]
        known.append(_digest(array("i", tokens), parent.to_bytes(KEY_BYTES)))
    return known[index]


def agreed(kinds: Seq[BlockGroup | StateSlots], seq: Sequence, most: int) -> int:
    """Return the most leading blocks behind which every kind can serve."""
    content = 0
    for kind in cycle(kinds):
        if content == len(kinds) or not most:
            break
        found = kind.longest(seq, most)
        content = content + 1 if found == most else 1
        most = found
    return most


def _seed(seq: Sequence) -> int:
    digest = seq.adapter.digest if seq.adapter and not seq.invocation else ""
    return _digest(f"{digest}:{seq.cache_salt}".encode()) if digest or seq.cache_salt else 0


def _digest(data: bytes | array[int], parent: bytes = b"") -> int:
    return int.from_bytes(blake2b(data, digest_size=KEY_BYTES, key=parent).digest())


NEAR: Final = 16
"""A prompt's last block has no snapshot of its own where one lies within a spacing divided by this."""


class StateSlots:
    """Hands out slots; those that no sequence has hold snapshots, and the least recently used goes first.

    A state cannot be cut back, so a prefix is found only where a snapshot of it was taken: at the end of a
    chunk, and of a block. Three places are worth one. Every `spacing` tokens, so that a long prompt which
    others share is found in part. The last full block of a prompt, where a conversation's next turn
    continues, and the last one before an activated adapter acts, unless the one before is so near that
    little is saved. And the place up to which blocks were found but no state was: another client had the
    same prefix, so others will have it too ("Marconi: Prefix Caching for the Era of Hybrid LLMs", Pan et
    al., 2024).

    Copies between slots are noted, and made by the runner before its next step: those of one mapping are all
    read before any is written, and mappings follow one another.
    """

    def __init__(self, num_slots: int, block_size: int, spacing: int | None) -> None:
        """Take a slot for each sequence that may run, and those for snapshots.

        Args:
            num_slots: all of them.
            block_size: tokens of a block.
            spacing: blocks between two snapshots of a long prompt; None: nothing is kept.
        """
        self.num_slots = num_slots
        self._block_size = block_size
        self._spacing = None if spacing is None else spacing * block_size
        self._free = list(range(num_slots))
        self._snapshots: OrderedDict[int, int] = OrderedDict()
        self._due: list[tuple[Sequence, int, int]] = []
        self._copies: list[dict[int, int]] = [{}]

    @property
    def num_free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free) + len(self._snapshots)

    def inspect(self) -> StateUse:
        """Return what the slots that no sequence has are used for."""
        return StateUse(tuple(self._snapshots.values()), frozenset(self._free))

    def longest(self, seq: Sequence, most: int) -> int:
        """Leading blocks, most at most, whose state was kept."""
        keys = ((count, prefix_key(seq, count - 1, self._block_size)) for count in range(most, 0, -1))
        return next((count for count, key in keys if key in self._snapshots), 0)

    def begin(self, seq: Sequence, found: int, known: int) -> None:
        """Give a sequence a slot, with the state of the blocks that were found; blocks of known were, too."""
        progress = seq.progress
        key = prefix_key(seq, found - 1, self._block_size) if found else None
        if key is not None:
            self._snapshots.move_to_end(key)
        progress.state_slot = self._take()
        if key is not None and key in self._snapshots:  # otherwise the sequence took the snapshot's slot
            self._copies[-1][progress.state_slot] = self._snapshots[key]
        progress.stops = self._places(seq, known * self._block_size)
        progress.stop = self._next(seq)

    def reached(self, seq: Sequence) -> None:
        """Note where a step that was submitted leaves a sequence: its state is kept before the next one."""
        progress = seq.progress
        if progress.num_computed < progress.stop:
            return
        if progress.num_computed == progress.stop:
            self._due.append((seq, progress.state_slot, progress.stop))
        progress.stop = self._next(seq)

    def keep(self) -> None:
        """Give the states that the last step left slots of their own: there are more than sequences have."""
        snapshots: dict[int, int] = {}
        for seq, slot, position in self._due:
            key = prefix_key(seq, position // self._block_size - 1, self._block_size)
            if key not in self._snapshots:
                self._snapshots[key] = self._take()
                snapshots[self._snapshots[key]] = slot
            self._snapshots.move_to_end(key)
        self._due.clear()
        if snapshots:
            self._copies += [snapshots, {}]

    def copies(self) -> tuple[Mapping[int, int], ...]:
        """Return what is to be copied, the slots that are written with those that are read, and forget it."""
        made = tuple(filter(None, self._copies))
        self._copies = [{}]
        return made

    def release(self, seq: Sequence) -> None:
        """Take a sequence's slot back, if it has one."""
        progress = seq.progress
        if progress.state_slot != NOWHERE:
            self._free.append(progress.state_slot)
            progress.state_slot = NOWHERE

    def forget(self, seq: Sequence, keys: Iterable[int]) -> None:
        """Remove the states with these keys of a sequence from later look-ups."""
        self._due = [due for due in self._due if due[0] is not seq]
        slots = (self._snapshots.pop(key, None) for key in keys)
        self._free += [slot for slot in slots if slot is not None]

    def forget_all(self) -> None:
        """Let no snapshot be found, and copy nothing."""
        self._free += self._snapshots.values()
        self._snapshots.clear()
        self._due.clear()
        self._copies = [{}]

    def _take(self) -> int:
        """A slot that no sequence has: a free one, or else that of the snapshot which was used longest ago."""
        return self._free.pop() if self._free else self._snapshots.popitem(last=False)[1]

    def _places(self, seq: Sequence, known: int) -> list[int]:
        """Return the positions at which a sequence should leave its state, beside every spacing."""
        if self._spacing is None:
            return []
        stops = [known]
        for position in (seq.invocation, len(seq.progress.tokens) - 1):
            last = position // self._block_size * self._block_size
            if last - max(stops[-1], last // self._spacing * self._spacing) >= self._spacing / NEAR:
                stops.append(last)
        return stops

    def _next(self, seq: Sequence) -> int:
        """The first position behind what is computed where a state is wanted."""
        progress = seq.progress
        if self._spacing is None:
            return NEVER
        regular = (progress.num_computed // self._spacing + 1) * self._spacing
        return min([regular, *(stop for stop in progress.stops if stop > progress.num_computed)])
