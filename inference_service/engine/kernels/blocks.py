"""Weights of 4, 5, 6 or 8 bits in blocks of 32 values, as llama.cpp keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

OF_BLOCK: Final = 32
"""Values of K of a block; its numbers of 6 bits have a scale for each half of it."""


@dataclass(frozen=True)
class WeightBlocks:
    """A weight [out, in] that is ``(number - zero) * scale``, or ``number * scale + offset``.

    Scales and offsets are of blocks; or they are products of two parts, the first of eight blocks each.
    """

    numbers: Tensor
    """uint8 [out, in]"""
    bits: int
    scales: Tensor
    """float16 [out, blocks or an eighth of them]"""
    offsets: Tensor | None = None
    """float16, as the scales."""
    parts: Tensor | None = None
    """int8 [out, scales of a row], the second parts of scales."""
    offset_parts: Tensor | None = None
    """int8 [out, blocks]"""

    @property
    def zero(self) -> int:
        """The number that means 0 where there are no offsets."""
        return 0 if self.offsets is not None else 1 << (self.bits - 1)

    def widened(self) -> Tensor:
        """Return the weight in float32, exact, or rounded once where it is a sum."""
        rows = len(self.numbers)
        scales = _product(self.scales, self.parts)
        values = self.numbers.view(rows, scales.shape[1], -1).float() - self.zero
        values.mul_(scales[..., None])
        if self.offsets is not None:
            offsets = _product(self.offsets, self.offset_parts)
            values = values.view(rows, offsets.shape[1], -1).add_(offsets[..., None])
        return values.view(rows, -1)

    def part(self, rows: Tensor, columns: slice | None = None) -> WeightBlocks:
        """Return some rows and columns; raise ValueError for columns that end within a block."""
        beside = self.scales, self.offsets, self.parts, self.offset_parts
        numbers, *found = cut((self.numbers, *beside), rows, columns)
        return WeightBlocks(numbers, self.bits, *found)

    def shared(self, across: int) -> Tensor:
        """Return the bytes of scales and offsets as ``cpu/blocks.h`` reads them, so many columns to a tile."""
        shared = _by_tile([self.scales, self.offsets], across, self.scales.shape[1])
        if self.parts is None:
            return shared
        inner = _by_tile([self.parts, self.offset_parts], across, self.numbers.shape[1] // OF_BLOCK)
        return torch.cat([shared, inner.view(*shared.shape[:2], -1)], dim=2)


def cut(tensors: Sequence[Tensor | None], rows: Tensor, columns: slice | None = None) -> list[Any]:
    """Return rows [n] and columns of tensors [out, groups], whose groups share columns of the first tensor;
    raise ValueError for columns that begin or end within a group.
    """
    found = [None if each is None else each[rows] for each in tensors]
    if columns is None or found[0] is None:
        return found
    width, parts = found[0].shape[1], list[Tensor | None]()
    for each in found:
        group = 1 if each is None else width // each.shape[1]
        if columns.start % group or columns.stop % group:
            raise ValueError(f"columns {columns.start} to {columns.stop} end within a group of {group}")
        own = slice(columns.start // group, columns.stop // group)
        parts.append(None if each is None else each[:, own].contiguous())
    return parts


def _product(whole: Tensor, parts: Tensor | None) -> Tensor:
    """Return scales in float32, of their parts where they have two."""
    if parts is None:
        return whole.float()
    return whole.float().repeat_interleave(parts.shape[1] // whole.shape[1], dim=1) * parts.float()


def _by_tile(of_rows: Sequence[Tensor | None], across: int, groups: int) -> Tensor:
    """Return the bytes of what rows have [out, groups * n] as [tiles, groups, bytes], columns side by side."""
    parts = []
    for each in (each for each in of_rows if each is not None):
        missing = -len(each) % across
        whole = pad(each, (0, 0, 0, missing)) if missing else each
        columns = whole.view(-1, across, groups, each.shape[1] // groups).permute(0, 2, 3, 1)
        parts.append(columns.contiguous().view(torch.uint8).view(len(columns), groups, -1))
    return torch.cat(parts, dim=2)
