"""Adapters with the compiled operations, on a CPU: packed, copied into the bank, and added to linears."""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.kernels.cpu.ops import (
    ADAPTER_FIELDS,
    NO_ADAPTERS,
    PIECE_FIELDS,
    SLICE_FIELDS,
    Adapters,
    CpuOps,
    Table,
    adapters_of,
)
from inference_service.engine.kernels.cpu.program import Place
from inference_service.engine.kernels.experts import ByExpert
from inference_service.engine.lora.packed import Layout, PackedAdapter, with_vocabulary, write_vectors
from inference_service.engine.lora.segments import Arrangement, Segment, runs_by_expert, sharing
from inference_service.engine.lora.slots import experts_of
from inference_service.engine.lora.weights import AdapterWeights, Numbers
from loramux_shared.bases.groups import GROUPS_APART, GroupShape, group_of

LANES: Final = 16
ADDRESSES: Final = [0, *range(4, ADAPTER_FIELDS, SLICE_FIELDS)]
"""Fields of an adapter in a linear that are addresses: A's, and B's of each slice."""
VECTORS: Final = [*range(7, ADAPTER_FIELDS, SLICE_FIELDS)]
"""Fields that are addresses where there are vectors, and 0 elsewhere."""


class NativeLora(LoraBackend):
    """Adds the adapters' part to the output of a fused linear: one call, exact ranks, no packing per step."""

    name = "native"

    def __init__(self, ops: CpuOps, groups: tuple[GroupShape, ...], num_layers: int) -> None:
        super().__init__()
        self._ops = ops
        self._layout = native_layout(groups, ops.units)
        self._names = [(layer, group.name) for layer in range(num_layers) for group in groups]
        self._of_experts = experts_of(groups, num_layers)
        self._linears: dict[tuple[int, str], tuple[int, int]] = {}
        """The bit of each in ``_touched``, and where the first slot's fields are."""
        self._arena = Arena(0)
        self._table = np.zeros((0, len(self._names), ADAPTER_FIELDS), dtype=np.int64)
        self._most_rows = self._columns = 0
        """Ranks of one adapter in a linear at most, and of those of one row."""
        self._touched = 0
        """Linears that the step's adapters add to, all adapters together, a bit for each linear."""
        self._arrangement = Arrangement((), ())
        self._segments = Table(np.zeros((0, 3), dtype=np.int64))
        self._parts: Table | None = None
        """Parts of the segments, where rows have several."""
        self._workspace = torch.empty(0, 1)
        self._step = NO_ADAPTERS[1:]
        self._places: tuple[Sequence[Place | None], int] = (), 0
        self._found = np.zeros((0, 7), dtype=np.int64)
        """The last result of `adapters_of_all`, of these linears and what was touched."""

    @property
    def num_bytes(self) -> int:
        """The arena's, and those of the tables that are touched when all slots are in use."""
        return self._arena.num_bytes + self._table.nbytes

    @property
    def slot_bytes(self) -> int:
        """The fields of all linears."""
        return len(self._names) * ADAPTER_FIELDS * self._table.itemsize

    def open(self, num_bytes: int, max_rank: int, num_slots: int, host_bytes: int = 0) -> None:  # noqa: ARG002 - nothing is locked
        """Reserve addresses; memory is taken when it is touched."""
        super().open(num_bytes, max_rank, num_slots)
        self._arena = Arena(num_bytes)
        # no np.zeros, which touches all of it where the allocator has that much left from what a start freed
        numbers = num_slots * self.slot_bytes
        fields = Arena(numbers).read(0, numbers, torch.int64).view(num_slots, len(self._names), ADAPTER_FIELDS)
        table = Table(fields.numpy())
        self._table = table.values
        for index, name in enumerate(self._names):
            self._linears[name] = 1 << index, table.address + index * ADAPTER_FIELDS * self._table.itemsize
        self._most_rows = max_rank * max(len(group.modules) for group in self._layout.shapes)

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Pack with one compiled call, which the interpreter does not wait for."""
        return pack_native(weights, self._layout, self._ops)

    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Copy with one thread: the others compute."""
        self.require_within(packed, offset)
        self._arena.write(offset, packed.matrices)

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Enter the addresses of an adapter's matrices in all linears."""
        super().enter(slot, offset, packed)
        flat = self._arena.read(offset, packed.num_bytes, packed.matrices.dtype)
        self.vocabularies.enter(slot, packed.vocabulary_in(flat))
        row = self._table[slot]
        row[:] = packed.table
        first = self._arena.address + offset
        row[:, ADDRESSES] += first
        row[:, VECTORS] += first * (row[:, VECTORS] > 0)

    def leave(self, slot: int) -> None:
        """Rank 0 in all linears."""
        super().leave(slot)
        self._table[slot] = 0

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        segments = arrangement.segments
        self._arrangement = arrangement
        self._touched = self.touched([segment.slot for segment in segments])
        rows_of = [(segment.slot, segment.start, segment.length) for segment in segments]
        self._segments = Table(np.array(rows_of, dtype=np.int64))
        self._parts, columns = None, self._most_rows
        if arrangement.mixed:
            self._parts = Table(_parts_of(segments, self._most_rows))
            columns *= arrangement.most_parts
        self._columns, rows = columns, segments[-1].end
        if self._workspace.shape[0] < rows or self._workspace.shape[1] < columns:
            self._workspace = torch.empty(rows, columns)
        self._step = adapters_of(0, self._segments, self._workspace, len(self._names), self._parts)[1:]

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        if self._linears[layer, group][0] & self._touched:
            self._ops.lora(x, out, self.adapters(layer, group))

    def apply_experts(self, x: Tensor, out: Tensor, layer: int, group: str, pairs: ByExpert) -> None:
        """Add to them in one call.

        To the compiled operation, an expert of an adapter is an adapter of its own.
        """
        if not self._touched & self._of_experts[layer]:
            return
        runs = runs_by_expert(self._arrangement.segments, pairs)
        parts = None if self._parts is None else Table(self._parts.values[runs[:, 0]])
        slots = self._segments.values[runs[:, 0], 0]
        runs[:, 1] = slots * len(self._names) + runs[:, 1] * GROUPS_APART
        _, address = self._linears[layer, group_of(group, 0)]
        segments, workspace = Table(runs[:, 1:]), torch.empty(len(x), self._columns)
        self._ops.lora(x, out, adapters_of(address, segments, workspace, parts=parts))

    def place(self, layer: int, group: str) -> Place:
        """Return which linear it is, for `adapters_of_all`."""
        return self._linears[layer, group]

    def adapters_of_all(self, places: Sequence[Place | None]) -> npt.NDArray[np.int64]:
        """Return `adapters` of linears, [places, 7]; zeros where there are none."""
        if (places, self._touched) != self._places:
            self._places, self._found = (places, self._touched), np.zeros((len(places), 7), dtype=np.int64)
            self._found[:, 0] = [place[1] if place and place[0] & self._touched else 0 for place in places]
        self._found[self._found[:, 0] > 0, 1:] = [each or 0 for each in self._step]
        return self._found

    def adapters(self, layer: int, group: str) -> Adapters:
        """Return those of the step that add to a linear."""
        bit, address = self._linears[layer, group]
        return (address, *self._step) if bit & self._touched else NO_ADAPTERS


def _parts_of(segments: Sequence[Segment], apart: int) -> npt.NDArray[np.int64]:
    """Return parts [S, 3] as `adapters_of` takes them, the ranks of a row so far apart."""
    parts: list[tuple[int, int]] = []
    for group in sharing(segments):
        parts += [(place * apart, 0 if place else len(group)) for place in range(len(group))]
    scales = np.array([segment.scale for segment in segments], dtype=np.float64)
    return np.column_stack([np.array(parts, dtype=np.int64), scales.view(np.int64)])


class Arena:
    """Bytes that never move; they are zero until they are written.

    Large pages are asked for: the first copy to a place takes a quarter of the time. Pages are kept when an
    adapter leaves, for the next one would only fault them in again.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes: Final = num_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=flags)
        with suppress(AttributeError, OSError):  # where there are none, small ones do
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.address: Final[int] = self._bytes.ctypes.data

    def read(self, offset: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
        """Return a view of what lies at an offset, as a flat tensor."""
        return torch.from_numpy(self._bytes[offset : offset + num_bytes]).view(dtype)

    def write(self, offset: int, values: Tensor) -> None:
        """Copy a flat tensor to an offset; the interpreter does not wait for it."""
        source = values.view(torch.uint8).numpy()
        np.copyto(self._bytes[offset : offset + len(source)], source)


def native_layout(shapes: tuple[GroupShape, ...], units: int) -> Layout:
    """Return the layout of matrices that are packed with so many values to a unit."""
    return Layout(shapes, width=LANES * units, columns=LANES, ranks=units)


def pack_native(weights: AdapterWeights, layout: Layout, ops: CpuOps) -> PackedAdapter:
    """Pack an adapter; the table is [layers * groups, ADAPTER_FIELDS]."""
    first_a, first_b, numel = layout.places(weights.ranks)
    size = ops.dtype.itemsize
    vectors, end = layout.vectors(weights, numel, size)
    matrices, values = torch.empty(end, dtype=ops.dtype), weights.values.to(ops.dtype)
    places = np.nonzero(weights.ranks)
    rank, inside, outside = (
        weights.ranks[places],
        layout.in_features[places[1]],
        layout.out_features[places[1]],
    )
    pieces = np.empty((len(rank), 2, PIECE_FIELDS), dtype=np.int64)
    for kind, firsts, to, fields in (
        (0, weights.first_a, first_a, (inside, 1, rank, inside)),
        (1, weights.first_b, first_b, (1, rank, rank, outside)),  # transposed
    ):
        pieces[:, kind, 0] = values.data_ptr() + firsts[places] * size
        for field, each in enumerate((*fields, kind), 1):
            pieces[:, kind, field] = each
        pieces[:, kind, 6] = matrices.data_ptr() + to[places] * size
    if len(rank):
        ops.pack(Table(pieces.reshape(-1, PIECE_FIELDS)))
    write_vectors(weights, vectors, matrices)
    table = _table(weights.ranks, first_a * size, first_b * size, vectors * size, layout)
    packed = PackedAdapter(matrices, table, weights.ranks, layout.linears(weights.ranks, vectors))
    return with_vocabulary(packed, weights)


def _table(ranks: Numbers, first_a: Numbers, first_b: Numbers, vectors: Numbers, layout: Layout) -> Numbers:
    """The fields of all linears; what no adapter touches is zero."""
    table = np.zeros((len(ranks), len(layout.shapes), ADAPTER_FIELDS), dtype=np.int64)
    for index, (shape, first) in enumerate(zip(layout.shapes, layout.firsts, strict=True)):
        of_group = slice(first, first + len(shape.modules))
        fields = table[:, index]
        fields[:, 0], fields[:, 1] = first_a[:, first], ranks[:, of_group].sum(1)
        fields[:, 2] = len(shape.modules)
        for at, (module, column) in enumerate(zip(range(first, of_group.stop), shape.out_offsets, strict=True)):
            own = 3 + SLICE_FIELDS * at
            fields[:, own], fields[:, own + 1] = ranks[:, module], first_b[:, module]
            fields[:, own + 2], fields[:, own + 3] = column, shape.out_features[at]
            fields[:, own + 4] = vectors[:, module]
    return table.reshape(-1, ADAPTER_FIELDS)
