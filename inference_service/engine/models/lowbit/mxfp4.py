"""MXFP4 (OCP Microscaling Formats 1.0): numbers of four bits, of which 32 share a power of two; of gpt-oss."""

from typing import Final

import torch
from torch import Tensor

from inference_service.engine.models.lowbit.words import NO_NUMBER, looked_up, pairs, powers
from inference_service.engine.models.packed import Pieces

VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1, by its bits."""
BYTES: Final = 16
"""Bytes of a block."""


class Mxfp4:
    """Experts' weights, kept [experts, out, in] and used [experts, in, out]."""

    turned = True

    def __init__(self, pieces: Pieces) -> None:
        """Take the tensors.

        Raises:
            CheckpointInvalid: they do not go together.
        """
        self.pieces = pieces
        if len(pieces.shape) != 3:
            raise pieces.invalid("weight", f"expected experts in 3-D, config.json implies {pieces.shape}.")
        self.matrices, self.columns, self.rows = pieces.shape
        blocks = -(-self.columns // (2 * BYTES))
        self.scheme = pieces.scheme("mxfp4", [self.rows, blocks], self.rows, self.columns)
        if self.columns % (2 * BYTES):
            raise pieces.invalid(
                "weight_blocks", f"expected a multiple of 32, config.json implies {self.columns}."
            )
        grid = (self.matrices, self.rows, blocks)
        self._blocks = pieces.take("weight_blocks", (torch.uint8,), (*grid, BYTES))
        self._scales = pieces.take("weight_scales", (torch.uint8,), grid)
        if bool((self._scales == NO_NUMBER).any()):
            raise pieces.invalid("weight_scales", f"expected exponents, found {NO_NUMBER}, which is no number.")

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows of an expert in float32."""
        numbers = looked_up(self._blocks[matrix, begin:end], pairs(VALUES))
        return numbers.mul_(powers(self._scales[matrix, begin:end, :, None])).flatten(1)
