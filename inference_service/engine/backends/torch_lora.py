"""Adapters by torch's operations, on any device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.kernels.experts import ByExpert
from inference_service.engine.lora.packed import FLOAT, Layout, PackedAdapter, pack_flat
from inference_service.engine.lora.segments import Arrangement, Segment, runs_by_expert
from inference_service.engine.lora.vocabulary import padded
from inference_service.engine.lora.weights import AdapterWeights, Numbers
from loramux_shared.bases.groups import GROUPS_APART, GroupShape, group_of


@dataclass(frozen=True)
class _Pack:
    """An adapter, or those of a set of slots, in one fused linear: slice by slice, then slot by slot."""

    a: Tensor
    """[R, in]"""
    b: tuple[Tensor | None, ...]
    """Per slice [R_s, out_s]."""
    ranks: tuple[tuple[int, ...], ...]
    """Per slice, per slot. Equal ranks share a mask."""

    def slices(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Yield the rows of A of each slice, and its B."""
        first = 0
        for b, ranks in zip(self.b, self.ranks, strict=True):
            yield slice(first, first + sum(ranks)), b
            first += sum(ranks)

    def add(
        self, x: Tensor, out: Tensor, shape: GroupShape, scale: float = 1.0, others: Tensor | None = None
    ) -> None:
        """Add to out [T, all slices] what it makes of x [T, in], but of ranks that others [T, R] mark."""
        y = torch.mm(x, self.a.t())
        if scale != 1.0:
            y.mul_(scale)
        if others is not None:  # filled, for 0 times what overflowed would be NaN
            y.masked_fill_(others, 0.0)
        for (own, b), offset, size in zip(self.slices(), shape.out_offsets, shape.out_features, strict=True):
            if b is not None:
                out[:, offset : offset + size].addmm_(y[:, own], b)


class _Adapter:
    """An adapter in its slot, as views of its one piece of memory."""

    def __init__(self, flat: Tensor, table: Numbers, layout: Layout) -> None:
        self._flat = flat
        self._table: list[list[list[int]]] = table.tolist()
        self.has_vectors = bool(table[..., -1].any())
        self._layout = layout

    def part(self, layer: int, index: int) -> _Pack | None:
        """Return what it adds to a group; None where that is nothing."""
        shape, first = self._layout.shapes[index], self._layout.firsts[index]
        fields = self._table[layer][first : first + len(shape.modules)]
        total = sum(rank for rank, _, _, _ in fields)
        if not total:
            return None
        begin, stride = fields[0][1], int(self._layout.strides[first])  # A of all slices is contiguous
        a = self._flat[begin : begin + total * stride].view(-1, stride)[:, : shape.in_features]
        b = tuple(
            self._flat[at : at + rank * out].view(rank, out) if rank else None
            for (rank, _, at, _), out in zip(fields, shape.out_features, strict=True)
        )
        return _Pack(a, b, tuple((rank,) for rank, _, _, _ in fields))

    def finish(self, out: Tensor, layer: int, index: int) -> None:
        """Multiply its rows [T, all slices] by the vectors that it has of a group, and add them."""
        shape, first = self._layout.shapes[index], self._layout.firsts[index]
        for module, (offset, size) in enumerate(zip(shape.out_offsets, shape.out_features, strict=True), first):
            at = self._table[layer][module][-1]
            if at:
                span = 2 * padded(size)
                both = self._flat[at : at + span * FLOAT // self._flat.itemsize].view(torch.float32).view(2, -1)
                c, d = both[:, :size]
                own = out[:, offset : offset + size]
                own.copy_(torch.addcmul(d, own.float(), c))


class TorchLora(LoraBackend):
    """Adds the adapters' part to the output of a fused linear.

    One product with the packed A of the active adapters, a mask, and one product per slice. Rows of adapters
    that come in long runs, as in prefill, take two products of their own: a shared one would multiply each row
    with every adapter's A.
    """

    name = "torch"

    def __init__(self, groups: tuple[GroupShape, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._dtype = dtype
        self._device = device
        self._layout = Layout(groups)
        self._groups = {group.name: index for index, group in enumerate(groups)}
        self._copied: dict[int, Tensor] = {}
        """Adapters that have no slot yet, by their offset."""
        self._adapters: dict[int, _Adapter] = {}
        self._slots: tuple[int, ...] = ()
        self._packs: dict[tuple[int, str], _Pack | None] = {}
        self._short: tuple[Segment, ...] = ()
        self._apart: tuple[Segment, ...] = ()
        """Those that take products of their own: long ones, and each part of a mixture."""
        self._others: dict[tuple[tuple[int, ...], ...], Tensor] = {}
        self._finished: tuple[Segment, ...] = ()
        """Those whose adapters have vectors."""

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Pack row by row."""
        return pack_flat(weights, self._layout, self._dtype)

    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Bring an adapter to the device; on a CPU it stays where it is."""
        self.require_within(packed, offset)
        for other, before in list(self._copied.items()):  # a copy that no slot uses
            if other < offset + packed.num_bytes and offset < other + before.nbytes:
                self._copied.pop(other, None)
        self._copied[offset] = packed.matrices.to(self._device)

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Keep what was copied."""
        super().enter(slot, offset, packed)
        flat = self._copied.pop(offset)
        self._adapters[slot] = _Adapter(flat, packed.table, self._layout)
        self.vocabularies.enter(slot, packed.vocabulary_in(flat))
        self._forget(slot)

    def leave(self, slot: int) -> None:
        """Drop it."""
        super().leave(slot)
        del self._adapters[slot]
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        if slot in self._slots:
            self._slots = ()
            self._packs.clear()

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        self.touched([segment.slot for segment in arrangement.segments])
        self._short, self._apart = arrangement.short, arrangement.long + arrangement.mixed
        self._others.clear()
        self._finished = tuple(
            segment for segment in arrangement.segments if self._adapters[segment.slot].has_vectors
        )
        slots = tuple(segment.slot for segment in self._short)
        if slots != self._slots:
            self._slots = slots
            self._packs.clear()

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        index = self._groups[group]
        if self._short:
            self._apply_short(x, out, layer, index)
        for segment in self._apart:
            self._apply_one(x, out, layer, index, segment)
        for segment in self._finished:
            self._adapters[segment.slot].finish(out[segment.start : segment.end], layer, index)

    def apply_experts(self, x: Tensor, out: Tensor, layer: int, group: str, pairs: ByExpert) -> None:
        """One adapter of one expert after the other."""
        first_group = self._groups[group_of(group, 0)]
        segments = (*self._short, *self._apart)
        for at, expert, first, length in runs_by_expert(segments, pairs).tolist():
            places = replace(segments[at], start=first, end=first + length)
            self._apply_one(x, out, layer, first_group + expert * GROUPS_APART, places)

    def _apply_one(self, x: Tensor, out: Tensor, layer: int, index: int, segment: Segment) -> None:
        part = self._adapters[segment.slot].part(layer, index)
        if part is not None:
            rows = slice(segment.start, segment.end)
            part.add(x[rows], out[rows], self._layout.shapes[index], segment.scale)

    def _apply_short(self, x: Tensor, out: Tensor, layer: int, index: int) -> None:
        shape = self._layout.shapes[index]
        key = layer, shape.name
        if key not in self._packs:
            self._packs[key] = self._pack(layer, index)
        pack = self._packs[key]
        if pack is None:
            return
        rows = slice(self._short[0].start, self._short[-1].end)
        others = self._of_others(pack.ranks) if len(self._short) > 1 else None
        pack.add(x[rows], out[rows], shape, others=others)

    def _pack(self, layer: int, index: int) -> _Pack | None:
        found = [self._adapters[slot].part(layer, index) for slot in self._slots]
        a: list[Tensor] = []
        b: list[Tensor | None] = []
        ranks = []
        cut = [None if part is None else [(part.a[own], b) for own, b in part.slices()] for part in found]
        for module in range(len(self._layout.shapes[index].modules)):
            parts = [(None, None) if slices is None else slices[module] for slices in cut]
            ranks.append(tuple(0 if own is None else len(own) for own, _ in parts))
            a += [own for own, part in parts if own is not None and part is not None]
            blocks = [part for _, part in parts if part is not None]
            b.append(torch.cat(blocks) if blocks else None)
        return _Pack(torch.cat(a), tuple(b), tuple(ranks)) if a else None

    def _of_others(self, ranks: tuple[tuple[int, ...], ...]) -> Tensor:
        """[rows, R]: True where row and rank belong to different adapters."""
        if ranks not in self._others:
            owner = torch.tensor(
                [slot for part in ranks for slot, rank in enumerate(part) for _ in range(rank)]
            )
            rows = torch.tensor([index for index, seg in enumerate(self._short) for _ in range(seg.length)])
            self._others[ranks] = (rows[:, None] != owner[None, :]).to(self._device)
        return self._others[ranks]
