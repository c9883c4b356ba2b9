"""The sequences' parts of the cache, kind by kind: blocks of keys and values, and recurrent states.

Layers that see equally far are a group with blocks of its own (`block_groups.py`); a base with layers that
carry a state has slots for it (`blocks.py`). A prefix is found where every kind can serve it.
"""

from array import array
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass

from inference_service.core.sequence import NEVER, Sequence
from inference_service.engine.scheduling.blocks import (
    BlockGroup,
    BlockPool,
    BlockUse,
    StateSlots,
    agreed,
    prefix_key,
)
from loramux_shared.bases.cache import window_blocks


@dataclass
class CacheStats:
    """Counters of the prefix cache, in tokens."""

    queried: int = 0
    hit: int = 0


@dataclass(frozen=True)
class _Refusal:
    """A sequence that did not fit."""

    seq: Sequence
    lacking: BlockPool
    """Pool that had not enough blocks for it."""
    releases: int
    """Number of times that blocks of it had become free by then."""
    missing: tuple[BlockPool, int] | None
    """A pool without the block behind those that were found, and its key; None where all have it."""
    spare: float | None
    """Part of each pool that had to stay spare."""


class BlockManager:
    """Hands out the cache, and finds what it holds of prefixes."""

    def __init__(
        self,
        num_blocks: int | Seq[int],
        block_size: int,
        windows: Seq[int | None] = (None,),
        *,
        states: StateSlots | None = None,
        prefix_cache: bool = True,
    ) -> None:
        """Take the blocks of each group of layers, in the order of their windows; one number is for all."""
        numbers = [num_blocks] * len(windows) if isinstance(num_blocks, int) else num_blocks
        sizes = zip(numbers, windows, strict=True)
        self.groups = tuple(BlockGroup(number, block_size, window) for number, window in sizes)
        self.states = states
        self.block_size = block_size
        self.stats = CacheStats()
        self._sliding = [place for place, group in enumerate(self.groups) if group.window is not None]
        self._prefix_cache = prefix_cache
        self._refused: _Refusal | None = None

    @property
    def slides(self) -> bool:
        """Return True if any layer has a window."""
        return bool(self._sliding)

    @property
    def num_blocks(self) -> int:
        """Return the blocks of the largest group: those that see everything, where there are such layers."""
        return max(group.pool.num_blocks for group in self.groups)

    @property
    def num_free(self) -> int:
        """Return the free ones of as many; of several groups the fullest decides the share."""
        if len(self.groups) == 1:
            return self.groups[0].pool.num_free
        return int(min(group.pool.num_free / group.pool.num_blocks for group in self.groups) * self.num_blocks)

    def inspect(self) -> tuple[BlockUse, ...]:
        """Return what the blocks of each group are used for."""
        return tuple(group.pool.inspect() for group in self.groups)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that num_tokens fill."""
        return -(-num_tokens // self.block_size)

    def start(self, seq: Sequence, spare: float | None = None) -> bool:
        """Give a sequence that holds nothing its prefix, as far as it is found, and room for its tokens.

        `num_computed` is set to what was found. The last token is always left to compute, since its row gives
        the next one; and the whole prompt while log probabilities of it are asked for, or the mean of its
        hidden states, since those come from its rows. Of layers with a window there must be as many blocks as
        it sees, which `grow` takes as rows come.

        Returns:
            False, with nothing changed, when there are not as many blocks, or none of what must stay spare.
        """
        progress = seq.progress
        if not progress.tables:
            progress.tables = (progress.blocks, *(array("i") for _ in self.groups[1:]))
        usable = self._usable(seq)
        known = agreed(self.groups, seq, usable) if usable else 0
        found = known if self.states is None else agreed((*self.groups, self.states), seq, known)
        if found:
            for group, table in zip(self.groups, progress.tables, strict=True):
                group.hold(seq, table, found)
        progress.num_full, progress.num_computed = found, found * self.block_size
        lacking = self._lacking(seq, spare)
        if lacking is not None:
            self._refuse(seq, lacking, found, usable, spare)
            return False
        for group, table in zip(self.groups, progress.tables, strict=True):
            if group.window is None:
                group.grow(table, self.blocks_for(len(progress.tokens)) - len(table))
        progress.room = min(map(len, progress.tables)) * self.block_size
        if self.states is not None:
            self.states.begin(seq, found, known)
        self.stats.queried += len(progress.tokens)
        self.stats.hit += progress.num_computed
        return True

    def still_refused(self, seq: Sequence, spare: float | None = None) -> bool:
        """True when this sequence was refused last, and since then no block became free or known for it."""
        last = self._refused
        if last is None or (last.seq, last.spare) != (seq, spare) or last.releases != last.lacking.releases:
            return False
        return last.missing is None or last.missing[1] not in last.missing[0]

    def grow(self, seq: Sequence, num_tokens: int, spare: float | None = None) -> bool:
        """Make room for the first num_tokens of a sequence; False, with nothing changed, when there is none."""
        progress = seq.progress
        if num_tokens <= progress.room:
            return True
        count = self.blocks_for(num_tokens)
        each = [
            (group, table, count - len(table))
            for group, table in zip(self.groups, progress.tables, strict=True)
        ]
        if not all(missing <= 0 or missing <= group.to_give(spare) for group, _, missing in each):
            return False
        for group, table, missing in each:
            group.grow(table, missing)
        progress.room = count * self.block_size
        return True

    def reach(self, seq: Sequence, spare: float | None) -> int:
        """Leading tokens of a sequence up to which layers with a window have blocks, or find free ones."""
        sliding = [(self.groups[place], len(seq.progress.tables[place])) for place in self._sliding]
        return min([NEVER, *(held + group.to_give(spare) for group, held in sliding)]) * self.block_size

    def register(self, seq: Sequence) -> None:
        """Make the full, computed blocks of a sequence findable, as far as their tokens are known.

        Those that no later row sees are given back, and where its state is wanted it is kept.
        """
        progress = seq.progress
        if progress.num_computed < (progress.num_full + 1) * self.block_size:
            return
        known = min(progress.num_computed, len(progress.tokens))
        while (progress.num_full + 1) * self.block_size <= known:
            if self._prefix_cache:
                key = prefix_key(seq, progress.num_full, self.block_size)
                for group, table in zip(self.groups, progress.tables, strict=True):
                    group.pool.note(key, table[progress.num_full])
            progress.num_full += 1
        for place in self._sliding:
            self.groups[place].leave_behind(progress.tables[place], known)
        if self.states is not None:
            self.states.reached(seq)

    def forget(self, seq: Sequence) -> None:
        """Let nothing of a sequence be found again, from where its adapter acts on."""
        keys = seq.progress.hashes[seq.invocation // self.block_size :]
        for group in self.groups:
            for key in keys:
                group.pool.forget(key)
        if self.states is not None:
            self.states.forget(seq, keys)

    def release(self, seq: Sequence) -> None:
        """Take everything that a sequence holds back."""
        progress = seq.progress
        for group, table in zip(self.groups, progress.tables, strict=False):
            group.release(table)
        if self.states is not None:
            self.states.release(seq)
        progress.num_computed = progress.num_full = progress.room = 0

    def lost(self, seq: Sequence) -> int:
        """Rows that a sequence computes again when it gives up what it holds, if nobody needs it meanwhile."""
        found = self._prefix_cache and self.states is None
        return seq.progress.num_computed - found * seq.progress.num_full * self.block_size

    def keep(self) -> None:
        """Keep the states that the last step left, where they are wanted; before any sequence gets a slot."""
        if self.states is not None:
            self.states.keep()

    def copies(self) -> tuple[Mapping[int, int], ...]:
        """Return the copies among states before the next step, as `Batch` has them."""
        return () if self.states is None else self.states.copies()

    def forget_all(self) -> None:
        """Let nothing be found again: what it holds is in doubt after a step that failed."""
        for group in self.groups:
            group.pool.forget_all()
        if self.states is not None:
            self.states.forget_all()

    def _lacking(self, seq: Sequence, spare: float | None) -> BlockPool | None:
        """Return the first pool that has not the blocks which a sequence must find before it begins."""
        progress = seq.progress
        whole = self.blocks_for(len(progress.tokens))
        for group, table in zip(self.groups, progress.tables, strict=True):
            missing = whole - len(table)
            if group.window is not None:
                held = len(table) - group.first_seen(progress.num_computed)
                missing = min(missing, window_blocks(group.window, self.block_size, self.block_size) - held)
            if missing > group.to_give(spare):
                return group.pool
        return None

    def _refuse(self, seq: Sequence, lacking: BlockPool, found: int, usable: int, spare: float | None) -> None:
        """Take back what a sequence was given that does not fit, and remember that it did not."""
        progress = seq.progress
        unknown = (group.pool for group in self.groups if found < usable and not group.knows(seq, found))
        pool = next(unknown, None)
        for group, table in zip(self.groups, progress.tables, strict=True):
            group.release(table)
        progress.num_computed = progress.num_full = 0
        missing = None if pool is None else (pool, prefix_key(seq, found, self.block_size))
        self._refused = _Refusal(seq, lacking, lacking.releases, missing, spare)

    def _usable(self, seq: Sequence) -> int:
        """Leading blocks that a sequence may take from the prefix cache."""
        cached = self._prefix_cache and not seq.needs_every_row
        return (len(seq.progress.tokens) - 1) // self.block_size if cached else 0
