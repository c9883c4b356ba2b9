"""Root mean square norms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


class RMSNorm:
    """x / rms(x) * (offset + weight), over the last axis."""

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        """Take a weight [dim], or [heads, dim] where every head has its own."""
        self._wide = bool(offset) and weight.dtype is not torch.float32
        # An offset is added in float32: in bfloat16, 1 + w would lose most of w.
        self._weight = weight.float() + offset if offset else weight
        self._shape = weight.shape[-1:]
        self._per_head = weight.dim() > 1
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [..., dim], normed."""
        wide = x.float() if self._wide else x
        if self._per_head:
            out = rms_norm(wide, self._shape, None, self._eps) * self._weight
        else:
            out = rms_norm(wide, self._shape, self._weight, self._eps)
        return out.to(x.dtype) if self._wide else out
