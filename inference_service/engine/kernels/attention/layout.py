"""The input of the kernels: the rows of the cache that each row of a step sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels.attention.balance import ITEM_FIELDS, MERGE_FIELDS, Ints, Units, runs
from inference_service.engine.kernels.attention.paged import Context
from inference_service.engine.kernels.attention.tuning import DECODE_BALANCE, PREFILL_BALANCE
from inference_service.engine.kernels.packing import most_tiles, sections

NOWHERE = -1
"""The cache row of padding, in device memory."""
MIN_BLOCK_SIZE = 16


@dataclass(frozen=True)
class AttentionCapacity:
    """The largest size of a step; grids depend on this and on nothing of the step."""

    rows: int
    chunks: int
    blocks_per_chunk: int
    """Cache blocks of the longest context."""
    block_size: int
    """Tokens of a cache block: a power of two."""
    tile: int | None = None
    """Rows of a chunk that one program of prefill takes, see `prefill_tile`; None: chunks have one row."""
    kv_heads: int = 8
    """Heads of keys: an item is a program for each. Only how finely contexts are cut depends on it."""
    groups: int = 1
    """Groups of layers whose cache blocks are apart."""

    def __post_init__(self) -> None:
        sizes = (
            self.rows,
            self.chunks,
            self.blocks_per_chunk,
            self.kv_heads,
            self.groups,
            1 if self.tile is None else self.tile,
        )
        if min(sizes) < 1:
            raise ValueError(f"capacities must be positive, got {self}")
        if self.block_size < MIN_BLOCK_SIZE or self.block_size & (self.block_size - 1):
            raise ValueError(
                f"block_size must be a power of two from {MIN_BLOCK_SIZE} on, got {self.block_size}"
            )

    @property
    def context(self) -> int:
        """Tokens of the longest context."""
        return self.blocks_per_chunk * self.block_size

    @property
    def tiles(self) -> int:
        """Enough for any step."""
        return most_tiles(self.rows, self.chunks, self.tile)

    @property
    def decode_items(self) -> int:
        """Enough for any step."""
        return DECODE_BALANCE.items(*self._decodes)

    @property
    def prefill_items(self) -> int:
        """Enough for any step."""
        return PREFILL_BALANCE.items(*self._prefills)

    @property
    def merges(self) -> int:
        """Rows that are merged, at most."""
        tiles = PREFILL_BALANCE.cut_units(*self._prefills)
        return min(self.rows, DECODE_BALANCE.cut_units(*self._decodes) + tiles * (self.tile or 0))

    @property
    def partial_rows(self) -> int:
        """Rows of partial results, at most: one for every row of every piece."""
        tiles = PREFILL_BALANCE.pieces(*self._prefills)
        return DECODE_BALANCE.pieces(*self._decodes) + tiles * (self.tile or 0)

    def workspace_bytes(self, num_heads: int, head_dim: int) -> int:
        """Memory of the partial results of a layer with so many query heads, in fp32; layers share it."""
        return 4 * self.partial_rows * num_heads * (head_dim + 1)

    def may_cut(self, window: int | None) -> bool:
        """Return True if a row of a layer with this window may see more keys than one program should take."""
        seen = self.context if window is None else min(self.context, window + (self.tile or 1) - 1)
        decoded = self.context if window is None else min(self.context, window)
        return DECODE_BALANCE.may_cut(decoded) or (self.tiles > 0 and PREFILL_BALANCE.may_cut(seen))

    @cached_property
    def sections(self) -> dict[str, slice]:
        """Return the place of each array in the one int32 buffer of a step; the blocks, seldom all used, come
        last.
        """
        return sections(
            {
                "cache_rows": self.groups * self.rows,
                "decodes": ITEM_FIELDS * self.decode_items,
                "prefills": ITEM_FIELDS * self.prefill_items,
                "merges": MERGE_FIELDS * self.merges,
                "blocks": self.groups * self.most_blocks,
            }
        )

    @property
    def most_blocks(self) -> int:
        """Blocks of all contexts of a step, at most."""
        return self.chunks * self.blocks_per_chunk

    def used(self, packed: npt.NDArray[np.int32]) -> tuple[slice, ...]:
        """The parts of the buffer that hold something, where `pack_tables` returned this."""
        first = self.sections["blocks"].start
        behind = [first + group * self.most_blocks for group in range(1, self.groups)]
        num = len(packed) - (behind[-1] if behind else first)
        return slice(0, first + num), *(slice(start, start + num) for start in behind)

    @property
    def _decodes(self) -> tuple[int, int, int]:
        return self.chunks, self.context, self.kv_heads

    @property
    def _prefills(self) -> tuple[int, int, int]:
        return self.tiles, self.context, self.kv_heads

    @property
    def packed_size(self) -> int:
        """int32 elements of that buffer."""
        last: int = self.sections["blocks"].stop
        return last


def pack_tables(
    capacity: AttentionCapacity, contexts: Sequence[Context], out: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.int32]:
    """The tables of a step as one int32 array ready to copy, without the part that no chunk uses.

    Args:
        capacity: what the device buffers were made for.
        contexts: the chunks of the step; rows that belong to none are padding.
        out: [packed_size], filled instead of a new array, for instance the view of a pinned buffer.

    Raises:
        ValueError: when chunks, rows, blocks or a chunk's length exceed the capacity, or blocks are missing.
    """
    columns = [c.row for c in contexts], [c.length for c in contexts], [c.end for c in contexts]
    row, length, end = chunks = np.array(columns, dtype=np.int64)
    needed = -(-end // capacity.block_size)
    _check_fits(capacity, contexts, chunks, needed)
    packed = np.empty(capacity.packed_size, dtype=np.int32) if out is None else out
    section = {name: packed[where] for name, where in capacity.sections.items()}
    first_block = np.cumsum(needed) - needed
    section["cache_rows"].fill(NOWHERE)
    chunk, within = runs(length)
    positions = (end - length)[chunk] + within
    for group in range(capacity.groups):
        blocks = section["blocks"][group * capacity.most_blocks :]
        for context, count, first in zip(contexts, needed.tolist(), first_block.tolist(), strict=True):
            table = context.table(group)
            if count > len(table):
                raise ValueError(f"{context.end} tokens need {count} blocks, got {len(table)}")
            blocks[first : first + count] = table[:count]
        own = blocks[first_block[chunk] + positions // capacity.block_size]
        own_rows = own * capacity.block_size + positions % capacity.block_size
        section["cache_rows"][group * capacity.rows + row[chunk] + within] = own_rows
    units = Units(row, length, end - length, first_block)
    one = length == 1
    decodes, merges = DECODE_BALANCE.shared(_of(units, one), capacity.kv_heads, 0)
    _fill(section["decodes"], decodes)
    if capacity.tile is not None:
        first_partial = int(merges[:, 2].sum())
        tiles = _tiles(_of(units, ~one), capacity.tile)
        prefills, more = PREFILL_BALANCE.shared(tiles, capacity.kv_heads, first_partial)
        _fill(section["prefills"], prefills)
        merges = np.concatenate([merges, more])
    _fill(section["merges"], merges)
    unused = capacity.most_blocks - int(needed.sum())
    return packed[: capacity.packed_size - unused]


def _of(units: Units, chosen: npt.NDArray[np.bool_]) -> Units:
    return Units(*(part[chosen] for part in (units.row, units.rows, units.at, units.first_block)))


def _tiles(chunks: Units, tile: int) -> Units:
    """Cut chunks into tiles of so many rows."""
    chunk, place = runs(-(-chunks.rows // tile))
    first = place * tile
    rows = np.minimum(chunks.rows[chunk] - first, tile)
    return Units(chunks.row[chunk] + first, rows, chunks.at[chunk] + first, chunks.first_block[chunk])


def _fill(section: npt.NDArray[np.int32], found: Ints) -> None:
    """Write what was found, and zeros behind it: no item, nothing to merge."""
    section[: found.size] = found.ravel()
    section[found.size :] = 0


def _check_fits(capacity: AttentionCapacity, contexts: Sequence[Context], chunks: Ints, needed: Ints) -> None:
    if len(contexts) > capacity.chunks:
        raise ValueError(f"{len(contexts)} chunks, but room for {capacity.chunks}")
    row, length, end = chunks
    outside = (length < 1) | (length > end) | (row < 0)
    if outside.any():
        raise ValueError(f"a chunk lies in its context and in the batch, got {contexts[outside.argmax()]}")
    if (behind := (row + length).max(initial=0)) > capacity.rows:
        raise ValueError(f"rows up to {behind}, but room for {capacity.rows}")
    if capacity.tile is None and (longest := length.max(initial=1)) > 1:
        raise ValueError(f"a chunk of {longest} rows, but room for decoding alone")
    if (most := needed.max(initial=0)) > capacity.blocks_per_chunk:
        raise ValueError(f"a context of {most} blocks, but room for {capacity.blocks_per_chunk}")


@dataclass(frozen=True)
class AttentionTables:
    """The cache rows that a step's rows see, on the device: static buffers, refilled before every step."""

    capacity: AttentionCapacity
    packed: Tensor = field(repr=False)
    """int32: the arrays below, in one buffer."""
    cache_rows: Tensor
    """int32 [groups * rows]: where a row's key and value go, or NOWHERE."""
    decodes: Tensor
    """int32 [decode items, 8] of `Balance.shared`: the chunks of one row; no rows: no item."""
    prefills: Tensor
    """int32 [prefill items, 8], likewise: tiles of the others."""
    merges: Tensor
    """int32 [merges, 4], likewise: rows that are in pieces; no pieces: nothing to merge."""
    blocks: Tensor
    """int32 [groups * chunks * blocks_per_chunk]: the cache blocks of all contexts, one after the other."""

    @classmethod
    def allocate(cls, capacity: AttentionCapacity, device: torch.device | str) -> AttentionTables:
        """Buffers that hold no chunk yet."""
        tables = cls.over(capacity, torch.zeros(capacity.packed_size, dtype=torch.int32, device=device))
        tables.load(torch.from_numpy(pack_tables(capacity, [])))
        return tables

    @classmethod
    def over(cls, capacity: AttentionCapacity, packed: Tensor) -> AttentionTables:
        """Tables in int32 [packed_size] of the device."""
        views = {name: packed[where] for name, where in capacity.sections.items()}
        return cls(
            capacity,
            packed,
            cache_rows=views["cache_rows"],
            decodes=views["decodes"].view(-1, ITEM_FIELDS),
            prefills=views["prefills"].view(-1, ITEM_FIELDS),
            merges=views["merges"].view(-1, MERGE_FIELDS),
            blocks=views["blocks"],
        )

    def of(self, group: int) -> AttentionTables:
        """The tables of one group of layers, in the same memory."""
        rows, blocks = self.capacity.rows, self.capacity.most_blocks
        return replace(
            self,
            cache_rows=self.cache_rows[group * rows : (group + 1) * rows],
            blocks=self.blocks[group * blocks : (group + 1) * blocks],
        )

    def load(self, packed: Tensor) -> None:
        """Take over what ``pack_tables`` made: one copy, asynchronous when ``packed`` is pinned."""
        self.packed[: len(packed)].copy_(packed, non_blocking=True)
