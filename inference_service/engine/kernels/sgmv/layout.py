"""The input of the kernels: the packed weights of a group, and the segments of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels.packing import aligned, sections

MAX_SLICES = 4
ROW = 16
"""Elements: rows of A and blocks of B begin at multiples, so that both are read in vectors."""
FIELDS = 4
"""Of a slice of a slot in the table: rank, first element of A, of B, and of the vectors, or 0."""
BASE = -1
"""Slot of rows without an adapter."""


class Phase(Enum):
    """The shape of a step's segments; it chooses the tiles."""

    DECODE = "decode"
    """Short segments: bandwidth and latency count, so the reduction over K is split."""
    PREFILL = "prefill"
    """Long segments: tall tiles, one plane."""


@dataclass(frozen=True)
class Slices:
    """The columns of a group's fused output that belong to each slice."""

    offsets: tuple[int, ...]
    """The first column of each slice."""
    sizes: tuple[int, ...]
    """The number of columns of each slice."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= MAX_SLICES or len(self.offsets) != len(self.sizes):
            raise ValueError(f"1 to {MAX_SLICES} slices, got offsets {self.offsets} and sizes {self.sizes}")
        spans = sorted(zip(self.offsets, self.sizes, strict=True))
        ends = [0, *(offset + size for offset, size in spans)]
        if min(self.sizes) < 1 or any(offset < end for (offset, _), end in zip(spans, ends, strict=False)):
            raise ValueError(f"slices must not overlap, got offsets {self.offsets} and sizes {self.sizes}")

    @classmethod
    def consecutive(cls, *sizes: int) -> Slices:
        """Slices that follow one another from column 0, as in a fused qkv."""
        return cls(tuple(sum(sizes[:i]) for i in range(len(sizes))), sizes)

    def tiles(self, width: int) -> int:
        """Return how many tiles of so many columns all slices have."""
        return sum(-(-size // width) for size in self.sizes)

    @property
    def out_features(self) -> int:
        """Columns that the fused output has at least."""
        return max(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def alignment(self) -> int:
        """Elements, at most 16: every block of B begins at a multiple, and so may be read in vectors."""
        return math.gcd(16, *self.sizes)


@dataclass(frozen=True)
class Group:
    """The adapters of one fused linear, packed; the ceilings are fixed for the life of a captured launch."""

    weights: Tensor
    """Flat, and other linears may have theirs in it: per slot and slice rows of A, ``stride_a`` apart, and a
    block of B [rank, size], row-major, that is B^T with the scale folded in; and of some the vectors c and d,
    fp32 [2, size rounded up to ROW]."""
    table: Tensor
    """int32 or int64 [slots, slices, FIELDS]; slots may lie apart."""
    slices: Slices
    in_features: int
    """Elements of a row of A."""
    max_rank: int
    """No slot has a larger rank in any slice."""
    max_rows: int
    """No slot has more rows over all its slices."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_rank <= self.max_rows:
            raise ValueError(f"1 <= max_rank <= max_rows, got {self.max_rank} and {self.max_rows}")

    @property
    def stride_a(self) -> int:
        """Elements from row to row of A."""
        return -(-self.in_features // ROW) * ROW

    @cached_property
    def floats(self) -> Tensor:
        """The weights as fp32, for the vectors."""
        return self.weights[: len(self.weights) // ROW * ROW].view(torch.float32)

    def check_table(self, table: npt.NDArray[np.int64]) -> None:
        """Raise ValueError, with the slot and what is wrong with it, for a host copy of the table that would
        make a kernel read or drop what it must not.
        """
        sizes = np.array(self.slices.sizes)
        if table.shape != tuple(self.table.shape):
            raise ValueError(f"table must be {tuple(self.table.shape)}, got {table.shape}")
        rank, first, element, vectors = (table[..., field] for field in range(FIELDS))
        span = 2 * _up(sizes) * torch.float32.itemsize // self.weights.itemsize
        used, numel = rank > 0, self.weights.shape[0]
        complaints = {
            f"a rank outside 0..{self.max_rank}": (rank < 0) | (rank > self.max_rank),
            f"more than {self.max_rows} rows": rank.sum(1, keepdims=True) > self.max_rows,
            f"rows of A outside of {numel} elements": used
            & ((first < 0) | (first + rank * self.stride_a > numel)),
            f"a block of B outside of {numel} elements": used
            & ((element < 0) | (element + rank * sizes > numel)),
            f"vectors outside of {numel} elements": (vectors < 0) | (vectors > 0) & (vectors + span > numel),
            f"matrices not at multiples of {ROW}": used & ((first % ROW != 0) | (element % ROW != 0)),
            f"vectors not at multiples of {ROW}": vectors % ROW != 0,
        }
        for complaint, where in complaints.items():
            if where.any():
                raise ValueError(f"slot {int(np.nonzero(where)[0][0])} has {complaint}")


def pack_table(ranks: Sequence[Sequence[int]], slices: Slices, in_features: int) -> npt.NDArray[np.int64]:
    """The table of adapters without vectors, one behind the other: per slot A of all slices, then B of each.

    ``ranks`` is per slot, per slice.
    """
    rank = np.asarray(ranks, dtype=np.int64).reshape(-1, len(slices.sizes))
    rows, blocks = rank * _up(np.array(in_features)), _up(rank * np.array(slices.sizes))
    sizes = np.concatenate([rows, blocks], axis=1)
    first = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    return np.stack([rank, first[:, : rank.shape[1]], first[:, rank.shape[1] :], 0 * rank], axis=-1)


def _up(elements: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return -(-elements // ROW) * ROW


@dataclass(frozen=True)
class SegmentCapacity:
    """The largest size of a step's segments; grids depend on this and on nothing of the step."""

    entries: int
    """Pairs of a token and a slot. Without composition: tokens."""
    slots: int
    """Slots that there are, in use or not: none is beyond them."""
    tile: int
    """Entries that a segment holds at most; longer runs of a slot become several segments."""
    passes: int = 1
    """Entries that one token may have. Each pass is one expand, because two entries add to the same row."""
    scaled: bool = False
    """True if entries carry a scale."""
    active: int | None = None
    """Distinct slots in one step at most, however many there are; None: all."""
    rows: int = 0
    """Rows of a step, all of which are in segments: those without an adapter come last. 0: there is none."""

    def __post_init__(self) -> None:
        if min(self.entries, self.slots, self.tile, self.passes, self.distinct) < 1:
            raise ValueError(f"capacities must be positive, got {self}")
        if self.rows and (self.passes > 1 or self.rows > self.entries):
            raise ValueError(f"rows without an adapter need one pass and room for all entries, got {self}")

    @property
    def distinct(self) -> int:
        """Slots that a step may have."""
        return self.slots if self.active is None else min(self.slots, self.active)

    @property
    def segments_per_pass(self) -> int:
        """Enough for any step: a run of n entries takes ceil(n / tile) segments, at most n."""
        return min(self.entries, self.distinct + self.entries // self.tile)

    @property
    def segments(self) -> int:
        """Segments over all passes."""
        return self.passes * self.segments_per_pass

    @property
    def runs(self) -> int:
        """Segments with those of rows without an adapter."""
        return max(self.segments, min(self.rows, self.segments + -(-self.rows // self.tile)))

    @cached_property
    def sections(self) -> dict[str, slice]:
        """Return the place of each array in the one int32 buffer that a step copies to the device."""
        return sections(
            {
                "token_ids": self.entries,
                "seg_start": self.runs + 1,
                "seg_slot": self.runs,
                "pass_start": self.passes + 2,
                "num_runs": 1 if self.rows else 0,
                "scales": self.entries if self.scaled else 0,
            }
        )

    @property
    def packed_size(self) -> int:
        """int32 elements of that buffer."""
        last: int = self.sections["scales"].stop
        return aligned(last)


def pack_segments(
    capacity: SegmentCapacity,
    slots: npt.ArrayLike,
    *,
    token_ids: npt.ArrayLike | None = None,
    scales: npt.ArrayLike | None = None,
    out: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.int32]:
    """Group entries by slot into segments of at most ``capacity.tile``, as one int32 array ready to copy.

    Args:
        capacity: what the device buffers were made for.
        slots: [n], the slot of each entry; negative for base tokens, which are left out unless the capacity has
            rows.
        token_ids: [n], each entry's row in x and out; by default entry i is token i.
        scales: [n], factors of the entries' updates; 1 by default.
        out: filled instead of a new array, for instance the view of a pinned buffer.

    Raises:
        ValueError: when a slot, a token's entries or the number of entries exceed the capacity.
    """
    slots = np.asarray(slots, dtype=np.int64)
    tokens = np.arange(slots.size) if token_ids is None else np.asarray(token_ids, dtype=np.int64)
    kept = np.nonzero(slots >= 0)[0]
    turns = np.zeros_like(kept) if token_ids is None else _turns(tokens[kept])
    _check_fits(capacity, slots[kept], turns, scaled=scales is not None)

    order = np.lexsort((tokens[kept], slots[kept], turns))
    turns, kept = turns[order], kept[order]
    first = _segment_starts(turns, slots[kept], capacity.tile)

    packed = np.empty(capacity.packed_size, dtype=np.int32) if out is None else out
    packed.fill(0)
    section = {name: packed[where] for name, where in capacity.sections.items()}
    section["token_ids"][: kept.size] = tokens[kept]
    section["seg_start"][: first.size] = first
    section["seg_start"][first.size :] = kept.size
    section["seg_slot"][: first.size] = slots[kept[first]]
    section["pass_start"][:-1] = np.searchsorted(turns[first], np.arange(capacity.passes + 1))
    section["pass_start"][-1] = kept.size
    if capacity.rows:
        base = np.ones(capacity.rows, dtype=bool)
        base[tokens[kept]] = False
        starts = np.arange(kept.size, capacity.rows, capacity.tile)
        runs = first.size + starts.size
        section["token_ids"][kept.size : capacity.rows] = np.nonzero(base)[0]
        section["seg_start"][first.size : runs] = starts
        section["seg_start"][runs:] = capacity.rows
        section["seg_slot"][first.size : runs] = BASE
        section["num_runs"][0] = runs
    if capacity.scaled:
        factors = np.ones(slots.size) if scales is None else np.asarray(scales)
        section["scales"][: kept.size] = factors[kept].astype(np.float32).view(np.int32)
    return packed


def _turns(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each entry, how many earlier entries have the same token: the pass that it belongs to."""
    order = np.argsort(tokens, kind="stable")
    new = np.ones(tokens.size, dtype=bool)
    new[1:] = np.diff(tokens[order]) != 0
    turns = np.empty_like(tokens)
    turns[order] = _since_true(new)
    return turns


def _segment_starts(
    turns: npt.NDArray[np.int64], slots: npt.NDArray[np.int64], tile: int
) -> npt.NDArray[np.intp]:
    new = np.ones(slots.size, dtype=bool)
    new[1:] = (np.diff(slots) != 0) | (np.diff(turns) != 0)
    return np.flatnonzero(_since_true(new) % tile == 0)


def _since_true(new: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The distance of each position from the last true one."""
    index = np.arange(new.size)
    return index - np.maximum.accumulate(np.where(new, index, 0))


def _check_fits(
    capacity: SegmentCapacity, slots: npt.NDArray[np.int64], turns: npt.NDArray[np.int64], *, scaled: bool
) -> None:
    if slots.size > capacity.entries:
        raise ValueError(f"{slots.size} entries, but room for {capacity.entries}")
    if slots.size and slots.max() >= capacity.slots:
        raise ValueError(f"slot {slots.max()}, but only {capacity.slots} slots")
    if slots.size and capacity.distinct < capacity.slots and np.unique(slots).size > capacity.distinct:
        raise ValueError(f"{np.unique(slots).size} different slots, but room for {capacity.distinct}")
    if slots.size and turns.max() >= capacity.passes:
        raise ValueError(f"a token has {turns.max() + 1} entries, but only {capacity.passes} passes")
    if scaled and not capacity.scaled:
        raise ValueError("scales were given, but the capacity has no room for them")


@dataclass(frozen=True)
class Segments:
    """The segments of a step on the device: static buffers, refilled before every step, shared by all layers.

    ``pack_segments`` is what fills them: it promises that no token has two entries in one pass.
    """

    capacity: SegmentCapacity
    packed: Tensor = field(repr=False)
    """int32: the arrays below, in one buffer."""
    token_ids: Tensor
    """int32 [entries]: the row of x and of out."""
    seg_start: Tensor
    """int32 [runs + 1]: segment i holds the entries from seg_start[i] to seg_start[i + 1]."""
    seg_slot: Tensor
    """int32 [runs]: the slot, or BASE."""
    pass_start: Tensor
    """int32 [passes + 2]: pass i has segments pass_start[i] to pass_start[i + 1]; the last is the entries."""
    num_runs: Tensor
    """int32 [1]: segments with those of BASE; empty where rows without an adapter are in none."""
    scales: Tensor | None
    """fp32 [entries]"""
    planes: Tensor = field(repr=False)
    """int32 [1]: in how many parts the last launch of shrink divided K; expand sums them."""

    @classmethod
    def allocate(cls, capacity: SegmentCapacity, device: torch.device | str) -> Segments:
        """Buffers that hold no entry yet."""
        segments = cls.over(capacity, torch.empty(capacity.packed_size, dtype=torch.int32, device=device))
        segments.load(torch.from_numpy(pack_segments(capacity, [])))
        return segments

    @classmethod
    def over(cls, capacity: SegmentCapacity, packed: Tensor) -> Segments:
        """Segments in int32 [packed_size] of the device."""
        views = {name: packed[where] for name, where in capacity.sections.items()}
        last, planes = views.pop("scales"), torch.zeros(1, dtype=torch.int32, device=packed.device)
        scales = last.view(torch.float32) if capacity.scaled else None
        return cls(capacity, packed, scales=scales, planes=planes, **views)

    def load(self, packed: Tensor) -> None:
        """Take over what ``pack_segments`` made: one copy, asynchronous when ``packed`` is pinned."""
        self.packed.copy_(packed, non_blocking=True)

    def of_pass(self, index: int) -> Tensor:
        """int32 [2]: the first segment of one pass, and the first behind it."""
        return self.pass_start[index : index + 2]
