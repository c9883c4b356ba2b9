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
    """Yield the rows of a bundle, each in the bundle's storage type."""
    dtype = bundle.manifest.dtype
    for row in bundle.rows:
        yield Matrices(row.row.layer, row.row.module, _tensor(row.a, dtype), _tensor(row.b, dtype))


def _tensor(array: Array, dtype: Dtype) -> Tensor:
    if dtype is Dtype.BFLOAT16:  # torch knows no numpy bfloat16: pass the bits
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
