"""A weight as its file keeps it, and its widening."""

from __future__ import annotations

import math
from typing import Final, Protocol

import torch
from torch import Tensor

from inference_service.models.formats.pieces import Pieces
from loramux_shared.bases.formats.scheme import WeightScheme

CHUNK: Final = 1 << 21
"""Numbers that are widened at once: beside the weight, some ten megabytes each of what comes between."""
ROWS: Final = 256
"""Chunks are of multiples of it, so that none begins within a word or a block."""


class Packed(Protocol):
    """A weight of few bits: matrices, most often one, of rows by columns."""

    pieces: Pieces
    """The tensors themselves, for whoever computes with them as they are."""
    scheme: WeightScheme
    matrices: int
    rows: int
    columns: int
    turned: bool
    """Whether a decoder asks for the matrices as columns by rows."""

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows of a matrix in float32; begin is a multiple of `ROWS`."""
        ...


def widened(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the weight in a type, in the shape that is asked for: exact in float32, and rounded once.

    Raises:
        CheckpointInvalid: it has values that are no numbers, or none of the type.
    """
    shape = packed.pieces.shape
    out = torch.empty(shape, dtype=dtype)
    views = out.view(packed.matrices, *shape[-2:])
    step = max(ROWS, CHUNK // max(1, packed.columns) // ROWS * ROWS)
    for matrix, view in enumerate(views.transpose(1, 2) if packed.turned else views):
        for begin in range(0, packed.rows, step):
            end = min(begin + step, packed.rows)
            view[begin:end] = packed.part(matrix, begin, end)
            if not bool(view[begin:end].isfinite().all()):
                raise packed.pieces.invalid(
                    "weight", f"expected numbers of {dtype}, found values beyond it, or none at all."
                )
    return out


def grids(pieces: Pieces, scales: Tensor) -> Tensor:
    """Return scales, or zero points, of a weight's matrices as [matrices, down, across].

    Raises:
        CheckpointInvalid: they are no grid for each matrix.
    """
    *matrices, rows, _ = pieces.shape
    count, shape = math.prod(matrices), list(scales.shape)
    if scales.numel() == 1:
        return scales.reshape(1, 1, 1).expand(count, 1, 1)
    if shape in (matrices, [*matrices, rows]):
        return scales.reshape(count, -1, 1)
    if len(shape) == len(matrices) + 2 and shape[:-2] == matrices:
        return scales.reshape(count, *shape[-2:])
    raise pieces.invalid("scales", f"expected a grid of scales for {pieces.shape}, found shape {shape}.")


def spread(scales: Tensor, of: WeightScheme, begin: int, end: int, columns: int) -> Tensor:
    """Return scales, or zero points, [down, across] for each number of some rows, or for all to share."""
    down, across = scales.shape
    if down > 1:
        scales = scales[torch.arange(begin, end) // (of.rows or 1)]
    if across > 1:
        scales = scales.repeat_interleave(of.columns or 1, dim=1)[:, :columns]
    return scales


def has_zeros(zeros: Tensor | None) -> bool | None:
    """Return whether there are zero points; None where all are 0, as they may stand beside a weight without."""
    if zeros is None:
        return False
    return True if bool(zeros.any()) else None
