"""The adapters in the device's memory, as the SGMV kernels read them."""

from typing import Final

import torch
from torch import Tensor

from inference_service.engine.kernels.launch import stream_of
from inference_service.engine.kernels.sgmv import Group, Slices
from inference_service.engine.kernels.sgmv.layout import FIELDS, ROW
from inference_service.engine.lora.packed import Empty, Layout, PackedAdapter, pack_flat, plain_memory
from inference_service.engine.lora.slab import Slab
from inference_service.engine.lora.slots import Slots
from inference_service.engine.lora.weights import AdapterWeights
from loramux_shared.bases.groups import GROUPS_APART, GroupShape, name_of_all


class Bank(Slots):
    """One arena for the matrices of all linears, and one table that says of every slot where its own lie.

    Neither moves: what was recorded when the bank was opened serves every adapter that comes later. `copy` may
    run on any thread; the others belong to the thread that launches, and what they do to the table is ordered
    behind what was launched before.
    """

    def __init__(
        self, shapes: tuple[GroupShape, ...], num_layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.groups: dict[tuple[int, str], Group] = {}
        """Groups by layer and name, once it is open."""
        self.experts: dict[tuple[int, str], Group] = {}
        """Groups of all experts, by layer and name; in them, each expert of a slot has a slot of its own."""
        self.num_experts: Final = sum(1 for shape in shapes if shape.expert is not None) // GROUPS_APART
        self._layout = Layout(shapes)
        self._num_layers = num_layers
        self._dtype = dtype
        self._device = device
        self._arena = torch.empty(0, dtype=dtype, device=device)
        self._table = torch.empty(0, dtype=torch.int64, device=device)
        self._stream = stream_of("copies", device) if device.type == "cuda" else None
        self._empty: Empty = plain_memory
        """Takes host memory for what is packed."""
        self._left: torch.cuda.Event | None = None
        """Behind the last step that may read what has left since."""

    @property
    def num_bytes(self) -> int:
        """Memory of the device: the arena and the table."""
        return self._arena.nbytes + self._table.nbytes

    def open(self, num_bytes: int, max_rank: int, num_slots: int, host_bytes: int = 0) -> None:
        """Take the memory, and that of the host, where there is a GPU."""
        if host_bytes and self._stream is not None:
            self._empty = Slab(host_bytes).empty
        super().open(num_bytes, max_rank, num_slots)
        shapes, modules = self._layout.shapes, len(self._layout.strides)
        numel = max(ROW, num_bytes // self._dtype.itemsize // ROW * ROW)
        self._arena = torch.empty(numel, dtype=self._dtype, device=self._device)
        # the last slot has no adapter
        table = num_slots + (self.num_experts > 0), self._num_layers, modules, FIELDS
        self._table = torch.zeros(table, dtype=torch.int64, device=self._device)
        for layer in range(self._num_layers):
            for shape, first in zip(shapes, self._layout.firsts, strict=True):
                if shape.expert is not None:
                    self._open_experts(layer, shape, first, max_rank)
                    continue
                of_group = self._table[:, layer, first : first + len(shape.modules)]
                self.groups[layer, shape.name] = _group(self._arena, of_group, shape, max_rank)

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of a slot in the table."""
        return self.slot_stride * FIELDS * int(self._table.itemsize)

    @property
    def slot_stride(self) -> int:
        """Modules from a slot to the next: how experts of a slot are numbered, `MODULES_APART` each."""
        return self._num_layers * len(self._layout.strides)

    def _open_experts(self, layer: int, shape: GroupShape, first: int, max_rank: int) -> None:
        """Number the experts of all slots by their first modules: one table, whose rows overlap."""
        if shape.expert != 0:
            return
        begin, slices = layer * len(self._layout.strides) + first, len(shape.modules)
        size = self._table.numel() // FIELDS - begin - slices + 1
        of_all = self._table.as_strided((size, slices, FIELDS), (FIELDS, FIELDS, 1), FIELDS * begin)
        self.experts[layer, name_of_all(shape.name)] = _group(self._arena, of_all, shape, max_rank)

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Pack an adapter into the opened host memory; raise ValueError for a table that misleads kernels."""
        packed = pack_flat(weights, self._layout, self._dtype, self._empty)
        for shape, first in zip(self._layout.shapes, self._layout.firsts, strict=True):
            table = packed.table[:, first : first + len(shape.modules)]
            whole = _group(packed.matrices, torch.from_numpy(table), shape, max(1, packed.max_rank))
            whole.check_table(table)
        return packed

    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Copy to a place that no slot has, behind steps that may still read it, and wait for the end."""
        self.require_within(packed, offset)
        first = offset // self._dtype.itemsize
        target = self._arena[first : first + len(packed.matrices)]
        if self._stream is None:
            target.copy_(packed.matrices)
            return
        with torch.cuda.stream(self._stream):
            if self._left is not None:
                self._stream.wait_event(self._left)
            target.copy_(packed.matrices, non_blocking=True)
            arrived = self._stream.record_event()
        arrived.synchronize()

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Fill a slot, with one asynchronous copy."""
        super().enter(slot, offset, packed)
        first = offset // self._dtype.itemsize
        flat = self._arena[first : first + len(packed.matrices)]
        self.vocabularies.enter(slot, packed.vocabulary_in(flat))
        table = torch.from_numpy(packed.table).clone()
        table[..., 1:3] += first
        table[..., 3] += first * (table[..., 3] > 0)
        _copy(self._table[slot], table)

    def leave(self, slot: int) -> None:
        """Empty a slot: rank 0 in all linears."""
        super().leave(slot)
        self._table[slot].zero_()
        if self._stream is not None:
            self._left = torch.cuda.current_stream(self._device).record_event()


def _group(weights: Tensor, table: Tensor, shape: GroupShape, max_rank: int) -> Group:
    return Group(
        weights=weights,
        table=table,
        slices=Slices(shape.out_offsets, shape.out_features),
        in_features=shape.in_features,
        max_rank=max_rank,
        max_rows=max_rank * len(shape.modules),
    )


def _copy(target: Tensor, source: Tensor) -> None:
    """Begin to copy from the host, from pinned memory: otherwise the host would wait for the end."""
    pinned = source.pin_memory() if target.is_cuda else source
    target.copy_(pinned, non_blocking=True)
