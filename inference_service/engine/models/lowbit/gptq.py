"""GPTQ (arXiv 2210.17323), as AutoGPTQ and gptqmodel keep it."""

from typing import Final

import torch
from torch import Tensor

from inference_service.engine.models.lowbit.words import NUMBERS, WORD, bits_of, groups_of, unpacked
from inference_service.engine.models.packed import Grouped, Pieces, Shared

ONES: Final = {4: 0x11111111, 8: 0x01010101}
"""One in each number of a word."""


class Gptq(Grouped):
    """Columns packed along rows, with zero points for each group of rows; what it keeps is turned."""

    def __init__(self, pieces: Pieces) -> None:
        """Take the tensors.

        Raises:
            CheckpointInvalid: they do not go together.
        """
        self.pieces = pieces
        self.rows, self.columns = rows, columns = pieces.matrix()
        self._words = pieces.take("qweight", (torch.int32,))
        words = self._words.shape[0] if self._words.dim() else 0
        self._bits = bits = bits_of(pieces, "qweight", words, columns)
        pieces.take("qweight", (torch.int32,), (words, rows))
        scales = pieces.groups_of_rows("scales", rows)
        groups = scales.shape[1]
        zeros = pieces.take("qzeros", (torch.int32,), (groups, -(-rows * bits // WORD)))
        if pieces.quantization.zeros_less_one:
            zeros = zeros + ONES[bits]  # carries included, as gptqmodel stores and reads them
        self.scheme = pieces.scheme(NUMBERS[bits], [rows, groups], rows, columns)
        index = groups_of(pieces, "g_idx", self.scheme, groups)
        if index is None and "g_idx" not in pieces.tensors and pieces.quantization.columns_are_ordered:
            raise pieces.invalid(
                "g_idx", "expected the group of each column, which desc_act implies, found none."
            )
        self.shared = Shared(self.scheme, scales, unpacked(zeros, bits)[:, :rows].t(), index)

    def numbers(self, begin: int, end: int) -> Tensor:
        """Return the integers of rows in float32."""
        return unpacked(self._words[:, begin:end].t(), self._bits)[:, : self.columns]
