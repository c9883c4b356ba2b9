"""The programs' shares of the keys: the work of a step, in items of about as many keys each.

An item is a few consecutive rows of a chunk with the keys that they see, or one of several *pieces* of those
keys. A context is cut where it is longer than its share, which is all keys of the step over the programs that
keep a GPU busy. So at most twice as many pieces are made as programs are wanted, however long contexts are.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

ITEM_FIELDS: Final = 8
MERGE_FIELDS: Final = 4
Ints = npt.NDArray[np.int64]

SPAN_STEP: Final = 128
"""Keys: shares are multiples of it, and so of every block_n."""


@dataclass(frozen=True)
class Units:
    """The units that may be cut: rows of decode, or tiles of prefill; an element of every array for each."""

    row: Ints
    """The first row in the batch."""
    rows: Ints
    at: Ints
    """The first row's position in the sequence."""
    first_block: Ints
    """First block of the chunk, in the array of all blocks."""


@dataclass(frozen=True)
class Balance:
    """The division of keys among programs."""

    programs: int
    """Those that keep a GPU busy, over all heads of keys."""
    min_span: int
    """Keys of a piece: below, it costs more than it saves. A multiple of `SPAN_STEP`."""

    def may_cut(self, seen: int) -> bool:
        """Return True if rows that see so many keys may be cut."""
        return seen > self.min_span

    def items(self, units: int, longest: int, kv_heads: int) -> int:
        """Return items that are enough for so many units that see at most so many keys."""
        return min(units + self._chunks_needed(kv_heads), units * self._most_pieces(longest))

    def cut_units(self, units: int, longest: int, kv_heads: int) -> int:
        """Return how many units are cut at most: those that see more than a share."""
        return min(units, self._chunks_needed(kv_heads)) if self.may_cut(longest) else 0

    def pieces(self, units: int, longest: int, kv_heads: int) -> int:
        """Return into how many pieces those are cut at most."""
        cut = self.cut_units(units, longest, kv_heads)
        return min(self._chunks_needed(kv_heads) + cut, cut * self._most_pieces(longest))

    def shared(self, units: Units, kv_heads: int, first_partial: int) -> tuple[Ints, Ints]:
        """Cut units.

        Args:
            units: of one step.
            kv_heads: an item is a program for each.
            first_partial: the first partial row that is free.

        Returns:
            The items [items, 8], those with most keys first: first row in the batch, rows, position of the
            first, first block, piece, pieces, first partial row of the unit, 0. And the rows that must be
            merged [merges, 4]: row in the batch, its first partial row, pieces, 0.
        """
        seen = units.at + units.rows
        share = -(-int(seen.sum()) // (self._chunks_needed(kv_heads) * SPAN_STEP)) * SPAN_STEP
        pieces = -(-seen // max(self.min_span, share))
        items = np.zeros((len(seen), ITEM_FIELDS), dtype=np.int64)
        for field, column in enumerate((units.row, units.rows, units.at, units.first_block)):
            items[:, field] = column
        items[:, 5] = pieces
        merges = np.zeros((0, MERGE_FIELDS), dtype=np.int64)
        if len(items) < int(pieces.sum()):
            partial_rows = np.where(pieces > 1, pieces * units.rows, 0)
            items[:, 6] = first_partial + np.cumsum(partial_rows) - partial_rows
            unit, within = runs(np.where(pieces > 1, units.rows, 0))
            row, _, _, _, _, count, partial, zero = items[unit].T
            merges = np.stack([row + within, partial + within * count, count, zero], axis=1)
            unit, piece = runs(pieces)
            items, seen, pieces = items[unit], seen[unit], pieces[unit]
            items[:, 4] = piece
        return items[np.argsort(-(seen // pieces), kind="stable")], merges

    def _chunks_needed(self, kv_heads: int) -> int:
        """Return items that keep a GPU busy: each is a program for every head of keys."""
        return -(-self.programs // kv_heads)

    def _most_pieces(self, longest: int) -> int:
        return -(-longest // self.min_span)


def runs(lengths: Ints) -> tuple[Ints, Ints]:
    """(run, place within it) of every element of runs of these lengths, one after the other."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - (np.cumsum(lengths) - lengths)[run]
