"""Norms of rows."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from inference_service.engine.kernels.attention import HeadNorm


class RMSNorm:
    """x / rms(x) * (offset + weight), over the last axis."""

    bias: Tensor | None = None

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        """Take a weight [dim], or [heads, dim] where every head has its own."""
        self.weight, self.eps, self.offset = weight, eps, offset
        self._wide = bool(offset) and weight.dtype is not torch.float32
        # An offset is added in float32: in bfloat16, 1 + w would lose most of w.
        self._factor = weight.float() + offset if offset else weight

    @property
    def of_heads(self) -> HeadNorm:
        """The same for the kernels that norm heads within attention."""
        return HeadNorm(self.weight, self.eps, self.offset)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [..., dim], normed, in plain torch."""
        wide = x.float() if self._wide else x
        if self.weight.dim() > 1:
            out = rms_norm(wide, self.weight.shape[-1:], None, self.eps) * self._factor
        else:
            out = rms_norm(wide, self.weight.shape, self._factor, self.eps)
        return out.to(x.dtype) if self._wide else out


class LayerNorm(RMSNorm):
    """The root mean square norm of rows from which their mean is subtracted, plus a bias."""

    def __init__(self, weight: Tensor, eps: float, bias: Tensor | None = None) -> None:
        """Take a weight [dim] and perhaps a bias [dim]."""
        super().__init__(weight, eps)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [..., dim], normed, in plain torch."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
