"""LoRA on a CPU: one product with the packed A of the active adapters, a mask, and one product per slice.

Rows of adapters that come in long runs, as in prefill, take two products of their own instead: a shared product
would multiply each row with every adapter's A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference_service.lora.segments import Arrangement, Segment
from inference_service.lora.weights import AdapterWeights, GroupWeights
from loramux_shared.bases.groups import GroupShape


@dataclass(frozen=True)
class _Pack:
    """The adapters of one set of slots in one fused linear, slice by slice, then slot by slot."""

    a: Tensor
    """[R, in]"""
    b: tuple[Tensor | None, ...]
    """Per slice [R_s, out_s]."""
    ranks: tuple[tuple[int, ...], ...]
    """Per slice, per slot. Equal ranks share a mask."""


class TorchLora:
    """Adds the adapters' part to the output of a fused linear."""

    name = "torch"

    def __init__(self, groups: tuple[GroupShape, ...], device: torch.device) -> None:
        self.home = device
        self._adapters: list[AdapterWeights] = []
        self._groups = {group.name: group for group in groups}
        self._slots: tuple[int, ...] = ()
        self._packs: dict[tuple[int, str], _Pack | None] = {}
        self._short: tuple[Segment, ...] = ()
        self._long: tuple[Segment, ...] = ()
        self._masks: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """The matrices as they were loaded."""
        return sum(weights.num_bytes for weights in self._adapters)

    def load(self, weights: AdapterWeights) -> int:
        """Take an adapter in as it is."""
        self._adapters.append(weights)
        return len(self._adapters) - 1

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        self._short, self._long = arrangement.short, arrangement.long
        self._masks.clear()
        slots = tuple(segment.slot for segment in self._short)
        if slots != self._slots:
            self._slots = slots
            self._packs.clear()

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        shape = self._groups[group]
        if self._short:
            self._apply_short(x, out, layer, shape)
        for segment in self._long:
            weights = self._adapters[segment.slot].layers[layer].get(group)
            if weights is not None:
                rows = slice(segment.start, segment.end)
                _add(x[rows], out[rows], weights.a, weights.b, weights.ranks, None, shape)

    def _apply_short(self, x: Tensor, out: Tensor, layer: int, shape: GroupShape) -> None:
        key = layer, shape.name
        if key not in self._packs:
            self._packs[key] = self._pack(layer, shape)
        pack = self._packs[key]
        if pack is None:
            return
        rows = slice(self._short[0].start, self._short[-1].end)
        mask = self._mask(pack.ranks, x) if len(self._short) > 1 else None
        widths = tuple(sum(ranks) for ranks in pack.ranks)
        _add(x[rows], out[rows], pack.a, pack.b, widths, mask, shape)

    def _pack(self, layer: int, shape: GroupShape) -> _Pack | None:
        found = [self._adapters[slot].layers[layer].get(shape.name) for slot in self._slots]
        a: list[Tensor] = []
        b: list[Tensor | None] = []
        ranks = []
        for index in range(len(shape.modules)):
            parts = [None if weights is None else _slice_of(weights, index) for weights in found]
            ranks.append(tuple(0 if part is None else part[0].shape[0] for part in parts))
            present = [part for part in parts if part is not None]
            a += [part[0] for part in present]
            b.append(torch.cat([part[1] for part in present]) if present else None)
        return _Pack(torch.cat(a), tuple(b), tuple(ranks)) if a else None

    def _mask(self, ranks: tuple[tuple[int, ...], ...], x: Tensor) -> Tensor:
        """[rows, R]: 1 where row and rank belong to the same adapter."""
        if ranks not in self._masks:
            owner = torch.tensor(
                [slot for part in ranks for slot, rank in enumerate(part) for _ in range(rank)]
            )
            rows = torch.tensor([index for index, seg in enumerate(self._short) for _ in range(seg.length)])
            self._masks[ranks] = (rows[:, None] == owner[None, :]).to(x)
        return self._masks[ranks]


def _slice_of(weights: GroupWeights, index: int) -> tuple[Tensor, Tensor] | None:
    """Return A [rank, in] and B [rank, out] of one slice."""
    b = weights.b[index]
    if b is None:
        return None
    first = sum(weights.ranks[:index])
    return weights.a[first : first + b.shape[0]], b


def _add(
    x: Tensor,
    out: Tensor,
    a: Tensor,
    b: tuple[Tensor | None, ...],
    widths: tuple[int, ...],
    mask: Tensor | None,
    shape: GroupShape,
) -> None:
    y = torch.mm(x, a.t())
    if mask is not None:
        y.mul_(mask)
    first = 0
    for part, width, offset, size in zip(b, widths, shape.out_offsets, shape.out_features, strict=True):
        if part is not None:
            out[:, offset : offset + size].addmm_(y[:, first : first + width], part)
            first += width
