"""Cache blocks: who holds which, and which hold a known prefix.

A full block is known by ``hash(parent hash, its tokens)``; the parent of a first block is the adapter's digest
with the cache salt. Blocks that nobody holds any more keep their content until they are needed for something
else, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from inference_service.core.sequence import Sequence


@dataclass
class CacheStats:
    """Counters of the prefix cache, in tokens."""

    queried: int = 0
    hit: int = 0


@dataclass(frozen=True)
class _Refusal:
    """A sequence that did not fit."""

    seq: Sequence
    releases: int
    """How often blocks had been released by then."""
    missing: int | None
    """The prefix hash of the first block that was not found; None where all were."""


class BlockManager:
    """Hands out the blocks of the key-value cache.

    Invariant: every block is held (reference count > 0), or free; a free block that holds a known prefix stays
    findable until it is handed out again.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.stats = CacheStats()
        self._prefix_cache = prefix_cache
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_hash: dict[int, int] = {}
        self._hash_of: dict[int, int] = {}
        self._releases = 0
        self._refused: _Refusal | None = None

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that num_tokens fill."""
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence) -> None:
        """Give a sequence without blocks those that hold its prefix, and set ``num_computed``.

        The last token is always left to compute, since its row gives the next one; and the whole prompt while
        log probabilities of it are asked for, since those come from its rows.
        """
        for index in range(self._usable(seq)):
            block = self._by_hash.get(self._hash(seq, index))
            if block is None:
                break
            self._hold(block)
            seq.blocks.append(block)
            seq.num_hashed = index + 1
        seq.num_computed = seq.num_hashed * self.block_size

    def refuse(self, seq: Sequence) -> None:
        """Take back what `admit` gave to a sequence that does not fit, and remember that it did not."""
        missing = seq.num_hashed
        self.release(seq)
        key = self._hash(seq, missing) if missing < self._usable(seq) else None
        self._refused = _Refusal(seq, self._releases, key)

    def still_refused(self, seq: Sequence) -> bool:
        """True when this sequence was refused last, and since then no block was released or found for it."""
        last = self._refused
        if last is None or last.seq is not seq:
            return False
        return last.releases == self._releases and last.missing not in self._by_hash

    def count(self, seq: Sequence) -> None:
        """Count an admission in the statistics."""
        self.stats.queried += len(seq.tokens)
        self.stats.hit += seq.num_computed

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for the first num_tokens of a sequence; False, with nothing changed, when there is none."""
        if num_tokens <= len(seq.blocks) * self.block_size:
            return True
        missing = self.blocks_for(num_tokens) - len(seq.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._refs[block] = 1
            seq.blocks.append(block)
        return True

    def register(self, seq: Sequence) -> None:
        """Make the full, computed blocks of a sequence findable, as far as their tokens are known."""
        if not self._prefix_cache or seq.num_computed < (seq.num_hashed + 1) * self.block_size:
            return
        known = min(seq.num_computed, len(seq.tokens))
        while (seq.num_hashed + 1) * self.block_size <= known:
            key, block = self._hash(seq, seq.num_hashed), seq.blocks[seq.num_hashed]
            if key not in self._by_hash:
                self._by_hash[key] = block
                self._hash_of[block] = key
            seq.num_hashed += 1

    def release(self, seq: Sequence) -> None:
        """Take all blocks of a sequence back; its tail is reused first, its prefix last."""
        for block in reversed(seq.blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)
        del seq.blocks[:]
        seq.num_computed = seq.num_hashed = 0
        self._releases += 1

    def forget_all(self) -> None:
        """Let no block be found again: what they hold is in doubt after a step that failed."""
        self._by_hash.clear()
        self._hash_of.clear()

    def _hold(self, block: int) -> None:
        if not self._refs[block]:
            del self._free[block]
        self._refs[block] += 1

    def _forget(self, block: int) -> None:
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._by_hash[key]

    def _usable(self, seq: Sequence) -> int:
        """Leading blocks that a sequence may take from the prefix cache."""
        cached = self._prefix_cache and not seq.scores_prompt
        return (len(seq.tokens) - 1) // self.block_size if cached else 0

    def _hash(self, seq: Sequence, index: int) -> int:
        """The prefix hash of a full block; a sequence keeps it, for its tokens only become more."""
        known, size = seq.hashes, self.block_size
        while len(known) <= index:
            parent = known[-1] if known else _seed(seq)
            tokens = seq.tokens[len(known) * size : (len(known) + 1) * size]
            known.append(_digest(",".join(map(str, (parent, *tokens)))))
        return known[index]


def _seed(seq: Sequence) -> int:
    digest = seq.adapter.digest if seq.adapter else ""
    return _digest(f"{digest}:{seq.cache_salt}") if digest or seq.cache_salt else 0


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest())
