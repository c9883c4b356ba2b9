"""``pack-quantized`` of compressed-tensors: integers of 4 or 8 bits, in words."""

import torch
from torch import Tensor

from inference_service.engine.models.lowbit.words import NUMBERS, WORD, bits_of, groups_of, unpacked
from inference_service.engine.models.packed import FLOATS, WHOLE, Grouped, Pieces, Shared, grids, has_zeros


class PackQuantized(Grouped):
    """Rows packed along columns, less half their range: of compressed-tensors."""

    lowest = -8

    def __init__(self, pieces: Pieces) -> None:
        """Take the tensors.

        Raises:
            CheckpointInvalid: they do not go together.
        """
        self.pieces = pieces
        self.rows, self.columns = rows, columns = pieces.matrix()
        self._words = pieces.take("weight_packed", (torch.int32,))
        words = self._words.shape[-1] if self._words.dim() else 0
        self._bits = bits_of(pieces, "weight_packed", words, columns)
        pieces.take("weight_packed", (torch.int32,), (rows, words))
        stated = pieces.take("weight_shape", WHOLE, (2,)).tolist()
        if stated != [rows, columns]:
            raise pieces.invalid("weight_shape", f"config.json implies {[rows, columns]}, found {stated}.")
        scales = grids(pieces, pieces.take("weight_scale", FLOATS).float())[0]
        down, across = scales.shape
        zeros = self._unpacked_zeros(down, across) if "weight_zero_point" in pieces.tensors else None
        self.scheme = pieces.scheme(NUMBERS[self._bits], [down, across], rows, columns, has_zeros(zeros))
        self.shared = Shared(self.scheme, scales, zeros, groups_of(pieces, "weight_g_idx", self.scheme, across))

    def _unpacked_zeros(self, down: int, across: int) -> Tensor:
        """Return zero points [down, across], which are packed along rows."""
        zeros = self.pieces.maybe("weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int8:  # one by one
            return self.pieces.take("weight_zero_point", (torch.int8,), (down, across)).float()
        words = -(-down * self._bits // WORD)
        zeros = self.pieces.take("weight_zero_point", (torch.int32,), (words, across))
        return unpacked(zeros.t(), self._bits)[:, :down].t() - self._half

    @property
    def _half(self) -> int:
        return 1 << (self._bits - 1)

    def numbers(self, begin: int, end: int) -> Tensor:
        """Return the integers of rows in float32."""
        return unpacked(self._words[begin:end], self._bits)[:, : self.columns].sub_(self._half)
