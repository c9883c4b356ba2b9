"""Numbers of eight bits side by side, with scales: FP8, and int8 of compressed-tensors."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from inference_service.models.formats.packed import grids, has_zeros, spread
from inference_service.models.formats.pieces import FLOATS, Pieces
from loramux_shared.bases.formats.scheme import Numbers

NUMBERS: Final[dict[torch.dtype, Numbers]] = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
SCALES: Final = ("weight_scale_inv", "weight_scale")
EXPONENTS: Final = (torch.float8_e8m0fnu, torch.uint8)
"""Scales that are powers of two, by their exponents; ``scale_fmt`` says it too."""


class Scaled:
    """A weight, or the weights of experts, and a grid of scales for each."""

    turned = False

    def __init__(self, pieces: Pieces) -> None:
        """Take the tensors.

        Raises:
            CheckpointInvalid: they do not go together.
        """
        self.pieces = pieces
        *matrices, self.rows, self.columns = pieces.shape
        self.matrices = math.prod(matrices)
        kept = {dtype for dtype, name in NUMBERS.items() if name in _numbers(pieces)}
        weight = pieces.take("weight", kept, pieces.shape)
        self._weight = weight.view(self.matrices, self.rows, self.columns)
        roles = [role for role in SCALES if role in pieces.tensors]
        if len(roles) > 1:
            raise pieces.invalid("weight", f"expected one of {' and '.join(roles)}, found both.")
        exponents = EXPONENTS if pieces.quantization.format == "fp8" else ()
        scale = pieces.take(roles[0], (*FLOATS, *exponents))
        self._scales = grids(pieces, _in_float32(scale, pieces))
        _, *grid = self._scales.shape
        zeros = pieces.maybe("weight_zero_point")
        self._zeros = None if zeros is None else grids(pieces, zeros.float())
        if self._zeros is not None and self._zeros.shape != self._scales.shape:
            raise pieces.invalid("weight_zero_point", f"expected as many as scales, {grid}.")
        self.scheme = pieces.scheme(
            NUMBERS[weight.dtype], grid, self.rows, self.columns, has_zeros(self._zeros)
        )

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows of a matrix in float32."""
        rows = self._weight[matrix, begin:end].float()
        if self._zeros is not None:
            rows -= spread(self._zeros[matrix], self.scheme, begin, end, self.columns)
        return rows.mul_(spread(self._scales[matrix], self.scheme, begin, end, self.columns))


def _numbers(pieces: Pieces) -> set[Numbers]:
    return {scheme.numbers for scheme in pieces.quantization.schemes}


def _in_float32(scale: Tensor, pieces: Pieces) -> Tensor:
    if scale.dtype not in EXPONENTS:
        return scale.float()
    exponents = scale.view(torch.uint8)
    if bool((exponents == 255).any()):
        raise pieces.invalid("weight_scale_inv", "expected exponents, found 255, which is no number.")
    return torch.ldexp(torch.ones(()), exponents.int() - 127)
