"""AWQ (arXiv 2306.00978), as AutoAWQ keeps it for its ``gemm``."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from inference_service.models.formats.packed import spread
from inference_service.models.formats.pieces import FLOATS, Pieces
from inference_service.models.formats.words import WORD, unpacked

ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the eight numbers of a word are, from its lowest four bits on."""


class Awq:
    """Rows packed along rows in an order of their own; what it keeps is turned."""

    turned, matrices = False, 1

    def __init__(self, pieces: Pieces) -> None:
        """Take the tensors.

        Raises:
            CheckpointInvalid: they do not go together.
        """
        self.pieces = pieces
        self.rows, self.columns = rows, columns = pieces.matrix()
        words, odd = divmod(rows, WORD // 4)
        if odd:
            raise pieces.invalid("qweight", f"expected a multiple of 8 rows, config.json implies {rows}.")
        self._words = pieces.take("qweight", (torch.int32,), (columns, words))
        scales = pieces.take("scales", FLOATS)
        groups = scales.shape[0] if scales.dim() else 0
        self._scales = pieces.take("scales", FLOATS, (groups, rows)).float().t()
        zeros = pieces.take("qzeros", (torch.int32,), (groups, words))
        self._zeros = self._ordered(zeros)
        self.scheme = pieces.scheme("int4", [rows, groups], rows, columns)

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows in float32."""
        del matrix
        rows = self._ordered(self._words[:, begin // 8 : end // 8])
        rows -= spread(self._zeros, self.scheme, begin, end, self.columns)
        return rows.mul_(spread(self._scales, self.scheme, begin, end, self.columns))

    def _ordered(self, words: Tensor) -> Tensor:
        """Return the numbers of words [n, m] as [m * 8, n], in the order of the rows."""
        numbers = unpacked(words, 4).view(*words.shape, 8)[..., list(ORDER)]
        return numbers.flatten(1).t().float()
