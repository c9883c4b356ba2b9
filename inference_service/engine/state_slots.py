"""The states of layers that carry one from token to token: a slot for each sequence under way, and snapshots.

A state cannot be cut back, so a prefix is found only where a snapshot of it was taken: at the end of a chunk,
and of a block. Three places are worth one. Every `spacing` tokens, so that a long prompt which others share is
found in part. The last full block of a prompt, where a conversation's next turn continues, and the last one
before an activated adapter acts, unless the one before is so near that little is saved. And the place up to
which blocks were found but no state was: another client had the same prefix, so others will have it too
("Marconi: Prefix Caching for the Era of Hybrid LLMs", Pan et al., 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from inference_service.core.sequence import NEVER, NOWHERE, Sequence
from inference_service.engine.blocks import prefix_key

NEAR: Final = 16
"""A prompt's last block has no snapshot of its own where one lies within a spacing divided by this."""


class StateSlots:
    """Hands out slots; those that no sequence has hold snapshots, and the least recently used goes first.

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
        """Give the states that the last step left, and whose tokens are known by now, slots of their own."""
        snapshots: dict[int, int] = {}
        for seq, slot, position in self._due:
            if position > len(seq.progress.tokens) or not self.num_free:
                continue
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
