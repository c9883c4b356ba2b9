"""What the kernels read: which rows of a step see which rows of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.kernels.attention.paged import Context
from inference_service.kernels.packing import sections

NOWHERE = -1
"""In device memory: the cache row of padding, and the chunk of a tile that no kernel may look at."""
MIN_BLOCK_SIZE = 16
CHUNK_FIELDS = 4


@dataclass(frozen=True)
class AttentionCapacity:
    """How large a step may become; grids depend on this and on nothing of the step."""

    rows: int
    chunks: int
    blocks_per_chunk: int
    """Cache blocks of the longest context."""
    block_size: int
    """Tokens of a cache block: a power of two."""
    tile: int | None = None
    """Rows of a chunk that one program of prefill takes, see `prefill_tile`; None: chunks have one row."""

    def __post_init__(self) -> None:
        if min(self.rows, self.chunks, self.blocks_per_chunk) < 1 or (self.tile is not None and self.tile < 1):
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
        """Enough for any step: every chunk of n > 1 rows takes ceil(n / tile) tiles."""
        if self.tile is None:
            return 0
        return min(self.rows, min(self.chunks, self.rows // 2) + self.rows // self.tile)

    @property
    def sections(self) -> dict[str, slice]:
        """Where each array lies in the one int32 buffer of a step; the blocks, seldom all used, come last."""
        return sections(
            {
                "cache_rows": self.rows,
                "chunks": CHUNK_FIELDS * self.chunks,
                "tiles": 2 * self.tiles,
                "blocks": self.chunks * self.blocks_per_chunk,
            }
        )

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
    needed = [-(-context.end // capacity.block_size) for context in contexts]
    _check_fits(capacity, contexts, needed)
    packed = np.empty(capacity.packed_size, dtype=np.int32) if out is None else out
    section = {name: packed[where] for name, where in capacity.sections.items()}
    fields = np.array([(c.row, c.length, c.end, 0) for c in contexts], dtype=np.int64).reshape(-1, CHUNK_FIELDS)
    fields[:, 3] = np.cumsum(needed) - needed
    for context, count, first in zip(contexts, needed, fields[:, 3].tolist(), strict=True):
        section["blocks"][first : first + count] = context.blocks[:count]

    section["chunks"].fill(0)
    section["chunks"][: fields.size] = fields.ravel()
    section["cache_rows"].fill(NOWHERE)
    rows, positions, first_blocks = _rows(fields)
    blocks = section["blocks"][first_blocks + positions // capacity.block_size]
    section["cache_rows"][rows] = blocks * capacity.block_size + positions % capacity.block_size
    if capacity.tile is not None:
        tiles = _tiles(fields, capacity.tile)
        section["tiles"].fill(NOWHERE)
        section["tiles"][: tiles.size] = tiles.ravel()
    return packed[: capacity.sections["blocks"].start + sum(needed)]


def _rows(fields: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """(row in the batch, position in the sequence, chunk's first block) of every row of every chunk."""
    row, length, end, first_block = fields.T
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    rows, positions = np.repeat(row, length) + within, np.repeat(end - length, length) + within
    return rows, positions, np.repeat(first_block, length)


def _tiles(fields: npt.NDArray[np.int64], tile: int) -> npt.NDArray[np.int64]:
    """[tiles, 2]: chunk and first row within it of every tile of prefill, those with most to see first."""
    _, length, end, _ = fields.T
    count = np.where(length > 1, -(-length // tile), 0)
    chunk = np.repeat(np.arange(len(fields)), count)
    first = (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)) * tile
    order = np.argsort((length - end)[chunk] - first, kind="stable")
    return np.stack([chunk, first], axis=1)[order]


def _check_fits(capacity: AttentionCapacity, contexts: Sequence[Context], needed: Sequence[int]) -> None:
    if len(contexts) > capacity.chunks:
        raise ValueError(f"{len(contexts)} chunks, but room for {capacity.chunks}")
    for context, count in zip(contexts, needed, strict=True):
        if not 1 <= context.length <= context.end or context.row < 0:
            raise ValueError(f"a chunk lies in its context and in the batch, got {context}")
        if context.row + context.length > capacity.rows:
            raise ValueError(f"rows up to {context.row + context.length}, but room for {capacity.rows}")
        if context.length > 1 and capacity.tile is None:
            raise ValueError(f"a chunk of {context.length} rows, but room for decoding alone")
        if count > capacity.blocks_per_chunk:
            raise ValueError(f"a context of {count} blocks, but room for {capacity.blocks_per_chunk}")
        if count > len(context.blocks):
            raise ValueError(f"{context.end} tokens need {count} blocks, got {len(context.blocks)}")


@dataclass(frozen=True)
class AttentionTables:
    """What the rows of a step see, on the device: static buffers, refilled before every step."""

    capacity: AttentionCapacity
    packed: Tensor = field(repr=False)
    """int32: the arrays below, in one buffer."""
    cache_rows: Tensor
    """int32 [rows]: where a row's key and value go, or NOWHERE."""
    chunks: Tensor
    """int32 [chunks, 4]: first row, rows, end of the context, first of ``blocks``; no rows: no chunk."""
    tiles: Tensor
    """int32 [tiles, 2]: chunk or NOWHERE, and the tile's first row within it."""
    blocks: Tensor
    """int32 [chunks * blocks_per_chunk]: the cache blocks of all contexts, one after the other."""

    @classmethod
    def allocate(cls, capacity: AttentionCapacity, device: torch.device | str) -> AttentionTables:
        """Buffers that hold no chunk yet."""
        packed = torch.zeros(capacity.packed_size, dtype=torch.int32, device=device)
        views = {name: packed[where] for name, where in capacity.sections.items()}
        tables = cls(
            capacity,
            packed,
            cache_rows=views["cache_rows"],
            chunks=views["chunks"].view(-1, CHUNK_FIELDS),
            tiles=views["tiles"].view(-1, 2),
            blocks=views["blocks"],
        )
        tables.load(torch.from_numpy(pack_tables(capacity, [])))
        return tables

    def load(self, packed: Tensor) -> None:
        """Take over what ``pack_tables`` made: one copy, asynchronous when ``packed`` is pinned."""
        self.packed[: len(packed)].copy_(packed, non_blocking=True)
