"""Blocks of one size: who holds which, and which hold a known prefix."""

from __future__ import annotations

from collections import OrderedDict


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
        """Let a block be found by a key from now on, unless another one is."""
        if key not in self._by_key:
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
