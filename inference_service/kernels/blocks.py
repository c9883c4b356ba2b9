"""Weights of 4, 5, 6 or 8 bits in blocks of 32 values, as llama.cpp keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

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
        values = values.mul_(scales[..., None]).view(rows, -1, OF_BLOCK)
        if self.offsets is not None:
            values += _product(self.offsets, self.offset_parts)[..., None]
        return values.view(rows, -1)

    def rows(self, index: Tensor) -> WeightBlocks:
        """Return some rows."""
        beside = (self.offsets, self.parts, self.offset_parts)
        chosen = (None if each is None else each[index] for each in beside)
        return WeightBlocks(self.numbers[index], self.bits, self.scales[index], *chosen)

    def packed(self, across: int) -> tuple[Tensor, Tensor]:
        """Return numbers and scales [tiles, ...] as ``cpu/blocks.h`` reads them, so many columns to a tile."""
        blocks = self.numbers.shape[1] // OF_BLOCK
        fours = _tiles(self.numbers.view(torch.int32), across, blocks, 8)  # numbers that stay together
        units = fours[..., 0].permute(0, 2, 3, 1).contiguous()
        if self.bits < 8:
            low, more = units & 0x0F0F0F0F, self.bits - 4
            parts = [low[:, :, ::2] | low[:, :, 1::2] << 4]
            if more:
                held = 8 // more
                high = (units >> 4 & 0x01010101 * ((1 << more) - 1)).view(
                    len(units), blocks, more, held, across
                )
                shifts = more * torch.arange(held, dtype=torch.int32)
                parts.append((high << shifts[:, None]).sum(3, dtype=torch.int32))
            units = torch.cat(parts, dim=2)
        shared = _by_tile([self.scales, self.offsets], across, self.scales.shape[1])
        if self.parts is not None:
            inner = _by_tile([self.parts, self.offset_parts], across, blocks)
            shared = torch.cat([shared, inner.view(*shared.shape[:2], -1)], dim=2)
        return units.contiguous(), shared.contiguous()


def _product(whole: Tensor, parts: Tensor | None) -> Tensor:
    """Return scales in float32, of their parts where they have two."""
    if parts is None:
        return whole.float()
    return whole.float().repeat_interleave(parts.shape[1] // whole.shape[1], dim=1) * parts.float()


def _tiles(of_rows: Tensor, across: int, *groups: int) -> Tensor:
    """Return what rows have [out, ...] as [tiles, across, *groups, n], with zeros where rows are missing."""
    missing = -len(of_rows) % across
    whole = pad(of_rows, (0, 0, 0, missing)) if missing else of_rows
    return whole.view(-1, across, *groups, of_rows.shape[1] // prod(groups))


def _by_tile(of_rows: Sequence[Tensor | None], across: int, groups: int) -> Tensor:
    """Return the bytes of what rows have [out, groups * n] as [tiles, groups, bytes], columns side by side."""
    every = [_tiles(each, across, groups).permute(0, 2, 3, 1) for each in of_rows if each is not None]
    parts = [each.contiguous().view(torch.uint8) for each in every]
    return torch.cat([part.view(len(part), groups, -1) for part in parts], dim=2)
