"""Root mean square norms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from inference_service.kernels.cpu.ops import CpuOps


class RMSNorm:
    """x / rms(x) * (offset + weight), over the last axis."""

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0, ops: CpuOps | None = None) -> None:
        """Take a weight [dim], or [heads, dim] where every head has its own."""
        self._ops = ops if weight.dim() == 1 else None
        self._plain, self._offset = weight, offset
        self._wide = bool(offset) and weight.dtype is not torch.float32
        # An offset is added in float32: in bfloat16, 1 + w would lose most of w.
        self._weight = weight.float() + offset if offset else weight
        self._shape = weight.shape[-1:]
        self._per_head = weight.dim() > 1
        self._eps = eps

    def add(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return hidden + delta [T, dim], for which hidden may be reused, and the same normed."""
        if self._ops is not None:
            return hidden, self._ops.rms_norm(hidden, delta, self._plain, self._eps, self._offset)
        hidden = hidden if delta is None else hidden + delta
        return hidden, self(hidden)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [..., dim], normed."""
        wide = x.float() if self._wide else x
        if self._per_head:
            out = rms_norm(wide, self._shape, None, self._eps) * self._weight
        else:
            out = rms_norm(wide, self._shape, self._weight, self._eps)
        return out.to(x.dtype) if self._wide else out
