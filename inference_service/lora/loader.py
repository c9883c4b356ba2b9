"""From a verified bundle to tensors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from inference_service.lora.weights import Matrices
from loramux_shared.bundle.npy import Array
from loramux_shared.bundle.reader import Bundle
from loramux_shared.deployment import Dtype


def matrices(bundle: Bundle) -> Iterator[Matrices]:
    """Yield the rows of a bundle, each in the bundle's storage type; they share its memory."""
    table = _tensor(bundle.table, bundle.manifest.dtype)
    for index, row in enumerate(bundle.manifest.rows):
        at, split = index * table.shape[1], row.rank * row.in_features
        a = table.as_strided((row.rank, row.in_features), (row.in_features, 1), at)
        b = table.as_strided((row.out_features, row.rank), (row.rank, 1), at + split)
        yield Matrices(row.layer, row.module, a, b)


def _tensor(array: Array, dtype: Dtype) -> Tensor:
    if dtype is Dtype.BFLOAT16:  # torch knows no numpy bfloat16: pass the bits
        return _shared(array.view(np.int16)).view(torch.bfloat16)
    return _shared(array)


def _shared(array: Array) -> Tensor:
    try:
        return torch.utils.dlpack.from_dlpack(array)
    except BufferError:  # numpy before 2.1 does not lend what may only be read
        return torch.from_numpy(array.copy())
