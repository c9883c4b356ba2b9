"""AWQ (arXiv 2306.00978), as AutoAWQ keeps it for its ``gemm``."""

from typing import Final

import torch
from torch import Tensor

from inference_service.engine.models.lowbit.words import WORD
from inference_service.engine.models.packed import Grouped, Pieces, Shared

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row of each of a word's eight numbers, from its lowest four bits on."""


class Awq(Grouped):
    """Rows packed along rows in an order of their own; what it keeps is turned."""

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
        scales = pieces.groups_of_rows("scales", rows)
        groups = scales.shape[1]
        zeros = pieces.take("qzeros", (torch.int32,), (groups, words))
        self.scheme = pieces.scheme("int4", [rows, groups], rows, columns)
        self.shared = Shared(self.scheme, scales, _ordered(zeros))

    def numbers(self, begin: int, end: int) -> Tensor:
        """Return the integers of rows in float32."""
        return _ordered(self._words[:, begin // 8 : end // 8])


def _ordered(words: Tensor) -> Tensor:
    """Return the numbers of words [n, m] in float32 [8 * m, n], in the order of the rows."""
    turned = words.t().contiguous()
    numbers = torch.empty(len(turned), len(ORDER), len(words))
    for place, row in enumerate(ORDER):
        numbers[:, row] = (turned >> 4 * place) & 15
    return numbers.flatten(0, 1)
