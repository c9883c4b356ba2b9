"""Numbers of eight bits side by side, with scales: FP8, and int8 of compressed-tensors."""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from inference_service.engine.models.lowbit.words import NO_NUMBER, powers
from inference_service.engine.models.packed import FLOATS, Pieces, Shared, grids, has_zeros

NUMBERS: Final[dict[torch.dtype, str]] = {
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.int8: "int8",
}
_LARGEST: Final = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}
"""Largest of the numbers without their signs; larger ones are NaN, or infinite."""
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
        stored = {scheme.numbers for scheme in pieces.quantization.schemes}
        weight = pieces.take("weight", [each for each in NUMBERS if NUMBERS[each] in stored], pieces.shape)
        if int((weight.view(torch.uint8) & 127).max()) > _LARGEST.get(weight.dtype, 127):
            raise pieces.invalid("weight", "expected finite numbers, found NaN or infinite ones.")
        self._weight = weight.view(self.matrices, self.rows, self.columns)
        scales = grids(pieces, _scales(pieces))
        _, *grid = scales.shape
        zeros = pieces.maybe("weight_zero_point")
        zeros = None if zeros is None else grids(pieces, zeros.float())
        if zeros is not None and zeros.shape != scales.shape:
            raise pieces.invalid("weight_zero_point", f"expected as many as scales, {grid}.")
        numbers = NUMBERS[weight.dtype]
        self.scheme = pieces.scheme(numbers, grid, self.rows, self.columns, has_zeros(zeros))
        each_zeros = [None] * self.matrices if zeros is None else list(zeros)
        self._shared = [Shared(self.scheme, *each) for each in zip(scales, each_zeros, strict=True)]

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows of a matrix in float32."""
        rows = self._weight[matrix, begin:end]
        return self._shared[matrix].apply(_AS_FLOATS[rows.dtype](rows), begin)


def _scales(pieces: Pieces) -> Tensor:
    """Return the scales in float32, as they are shaped."""
    roles = [role for role in SCALES if role in pieces.tensors]
    if len(roles) > 1:
        raise pieces.invalid("weight", f"expected one of {' and '.join(roles)}, found both.")
    exponents = EXPONENTS if pieces.quantization.format == "fp8" else ()
    scales = pieces.take(roles[0], (*FLOATS, *exponents))
    if scales.dtype not in EXPONENTS:
        return scales.float()
    if bool((scales.view(torch.uint8) == NO_NUMBER).any()):
        raise pieces.invalid(roles[0], f"expected exponents, found {NO_NUMBER}, which is no number.")
    return powers(scales.view(torch.uint8))


def _from_e5m2(values: Tensor) -> Tensor:
    """Return numbers in float32: e5m2 is the upper half of float16."""
    return values.view(torch.int8).short().bitwise_left_shift_(8).view(torch.float16).float()


def _from_e4m3(values: Tensor) -> Tensor:
    """Return numbers in float32, in a fifteenth of torch's time, which goes one by one.

    Sign, exponent and fraction of e4m3, moved to where float16 has them, are the number over 256, for exponents
    count from 7 in one and from 15 in the other. NaN would be 480.
    """
    moved = values.view(torch.int8).short().bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return moved.view(torch.float16).float().mul_(256)


_AS_FLOATS: Final[dict[torch.dtype, Callable[[Tensor], Tensor]]] = {
    torch.float8_e4m3fn: _from_e4m3,
    torch.float8_e5m2: _from_e5m2,
    torch.int8: Tensor.float,
}
