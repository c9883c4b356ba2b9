"""The input of the kernels: the sequences of a step's rows, and the places of their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels.delta.inputs import StateChunk
from inference_service.engine.kernels.packing import most_tiles, sections

CHUNK_FIELDS = 4
TILE_FIELDS = 2


@dataclass(frozen=True)
class DeltaCapacity:
    """The largest size of a step; grids depend on this and on nothing of the step."""

    rows: int
    chunks: int
    tile: int | None = None
    """Rows of a longer chunk that are computed together, see `delta_tile`; None: all chunks have one row."""

    def __post_init__(self) -> None:
        if min(self.rows, self.chunks, 1 if self.tile is None else self.tile) < 1:
            raise ValueError(f"capacities must be positive, got {self}")
        if self.tile is None and self.rows != self.chunks:
            raise ValueError(f"where all chunks have one row, there are as many of both, got {self}")

    @property
    def tiles(self) -> int:
        """Enough for any step."""
        return most_tiles(self.rows, self.chunks, self.tile)

    @property
    def sections(self) -> dict[str, slice]:
        """Return the place of each array in the one int32 buffer of a step."""
        return sections({"chunks": CHUNK_FIELDS * self.chunks, "tiles": TILE_FIELDS * self.tiles})

    @property
    def packed_size(self) -> int:
        """int32 elements of that buffer."""
        last: int = self.sections["tiles"].stop
        return last


def pack_delta(
    capacity: DeltaCapacity, chunks: Sequence[StateChunk], out: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.int32]:
    """The tables of a step as one int32 array ready to copy.

    Args:
        capacity: what the device buffers were made for.
        chunks: those of the step, each with a slot of its own; rows that belong to none are padding. Where all
            have one row, the i-th chunk has row i.
        out: [packed_size], filled instead of a new array, for instance the view of a pinned buffer.

    Raises:
        ValueError: chunks, rows or a chunk's length exceed the capacity, or rows are not where they should be.
    """
    _check_fits(capacity, chunks)
    packed = np.zeros(capacity.packed_size, dtype=np.int32) if out is None else out
    fields = packed[capacity.sections["chunks"]].reshape(-1, CHUNK_FIELDS)
    fields[: len(chunks)] = np.array(chunks, dtype=np.int32).reshape(-1, CHUNK_FIELDS)
    fields[len(chunks) :] = 0
    fields[len(chunks) :, 0] = np.arange(len(chunks), capacity.chunks)  # decode makes these rows 0
    if capacity.tile is not None:
        tiles = [
            (chunk.row + first, min(capacity.tile, chunk.length - first))
            for chunk in chunks
            if chunk.length > 1
            for first in range(0, chunk.length, capacity.tile)
        ]
        places = packed[capacity.sections["tiles"]].reshape(-1, TILE_FIELDS)
        places[: len(tiles)] = np.array(tiles, dtype=np.int32).reshape(-1, TILE_FIELDS)
        places[len(tiles) :] = 0
    return packed


def _check_fits(capacity: DeltaCapacity, chunks: Sequence[StateChunk]) -> None:
    if len(chunks) > capacity.chunks:
        raise ValueError(f"{len(chunks)} chunks, but room for {capacity.chunks}")
    for index, chunk in enumerate(chunks):
        if chunk.length < 1 or chunk.row < 0 or chunk.slot < 0:
            raise ValueError(f"a chunk has rows and a slot, got {chunk}")
        if chunk.row + chunk.length > capacity.rows:
            raise ValueError(f"rows up to {chunk.row + chunk.length}, but room for {capacity.rows}")
        if capacity.tile is None and (chunk.length, chunk.row) != (1, index):
            raise ValueError(f"in a step that decodes alone, chunk {index} has row {index}, got {chunk}")


@dataclass(frozen=True)
class DeltaTables:
    """The chunks of a step on the device: static buffers, refilled before every step, shared by all layers."""

    capacity: DeltaCapacity
    packed: Tensor = field(repr=False)
    """int32: the arrays below, in one buffer."""
    chunks: Tensor
    """int32 [chunks, 4]: the fields of `StateChunk`; length 0: no chunk."""
    tiles: Tensor
    """int32 [tiles, 2]: the first row and the rows of a tile of a chunk with more than one; 0: no tile."""

    @classmethod
    def allocate(cls, capacity: DeltaCapacity, device: torch.device | str) -> DeltaTables:
        """Buffers that hold no chunk yet."""
        tables = cls.over(capacity, torch.zeros(capacity.packed_size, dtype=torch.int32, device=device))
        tables.load(torch.from_numpy(pack_delta(capacity, [])))
        return tables

    @classmethod
    def over(cls, capacity: DeltaCapacity, packed: Tensor) -> DeltaTables:
        """Tables in int32 [packed_size] of the device."""
        views = {name: packed[where] for name, where in capacity.sections.items()}
        chunks, tiles = views["chunks"].view(-1, CHUNK_FIELDS), views["tiles"].view(-1, TILE_FIELDS)
        return cls(capacity, packed, chunks=chunks, tiles=tiles)

    def load(self, packed: Tensor) -> None:
        """Take over what ``pack_delta`` made: one copy, asynchronous when ``packed`` is pinned."""
        self.packed.copy_(packed, non_blocking=True)
