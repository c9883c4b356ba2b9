"""The output of a module under an adapter, from the adapter's own files."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass
class ReferenceFactors:
    """The change of the output of one module of one layer; everything is float32.

    ``W x + bias`` becomes ``c * (W x + x Aᵀ Bᵀ) + bias + lora_bias``, where c are magnitudes over the norms of
    the rows of W + BA, or 1.
    """

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank], scale included."""
    magnitude: Tensor | None = None
    """[out]"""
    lora_bias: Tensor | None = None
    """[out], scale included."""
    bias: Tensor | None = None
    """[out]: in the place of the base's."""
    scales_bias: bool = False
    """True if magnitudes multiply the base's bias too, as IA3's do."""
    normalised: bool = False
    """True if magnitudes are divided by the norms already."""
    cut: int | None = None
    """The rank to which the product is cut; norms are those of all of it."""
    _c: Tensor | None = None

    @cached_property
    def product(self) -> tuple[Tensor, Tensor]:
        """A and B as they are multiplied with."""
        return _truncated(self.a, self.b, self.cut)

    def added(self, x: Tensor) -> Tensor:
        """Return what A and B make of x [T, in], [T, out]."""
        a, b = self.product
        return x @ a.T @ b.T

    @property
    def plain(self) -> bool:
        """Return True if there is nothing but A and B."""
        return self.magnitude is None and self.lora_bias is None and self.bias is None

    def changed(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what becomes of y = W x, for a module with a weight [out, in] and a bias [out]."""
        y = y + self.added(x)
        if self.magnitude is not None:
            if self._c is None:
                norms = 1.0 if self.normalised else (weight + self.b @ self.a).norm(dim=1)
                self._c = self.magnitude / norms
            if self.scales_bias and bias is not None:
                return self._c * (y + bias)
            y = self._c * y
        for added in (bias if self.bias is None else self.bias, self.lora_bias):
            y = y if added is None else y + added
        return y


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return what B of a module is multiplied by."""
    alpha = config.get("lora_alpha")
    alpha = 8.0 if alpha is None else float(alpha)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _truncated(a: Tensor, b: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The best approximation of the product, by torch."""
    if rank is None or len(a) <= rank:
        return a, b
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, values, vt = torch.linalg.svd(r_b @ r_a.T)
    a, b = vt[:rank] @ q_a.T, q_b @ (u[:, :rank] * values[:rank])
    return a.float(), b.float()
