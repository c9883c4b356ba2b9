"""A layer's inputs for attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inference_service.engine.kernels.attention.paged import MOST
from inference_service.engine.kernels.launch import require
from loramux_shared.bases.rope import HeadCounts


@dataclass(frozen=True)
class HeadNorm:
    """x / rms(x) * (offset + weight) of heads of queries, keys and values."""

    weight: Tensor
    """[d] of all queries and keys, or [n, d] of the first n heads, where what is normed is rounded first unless
    there is an offset."""
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """The tensors of one layer in one step."""

    heads: Tensor
    """[T, query heads + 2 kv heads, d]: queries, keys and values, or queries alone; only read."""
    cos: Tensor
    """[T, rotary] of `Rope.at`"""
    sin: Tensor
    """[T, rotary] of `Rope.at`: the first half is negated."""
    keys: Tensor
    """[kv heads, cache rows, d]"""
    values: Tensor
    """Values, in the keys' layout."""
    writes: bool = True
    """True if the heads have keys and values, for the cache."""
    scales: Tensor | None = None
    """bfloat16 [2, kv heads, cache rows] of keys and values of 8 bits; None: they have the heads' type."""

    def __post_init__(self) -> None:
        require(self.heads, "heads", dims=3)
        self._check_cache_types()
        for name in ("cos", "sin"):
            require(getattr(self, name), name, dims=2, device=self.heads.device)
        self._check_heads()
        self._check_rotation()

    def _check_cache_types(self) -> None:
        """Raise ValueError for keys and values of another type than the heads', unless they have scales."""
        dtype, device = self.heads.dtype, self.heads.device
        kept = dtype if self.scales is None else self.keys.dtype
        for name in ("keys", "values"):
            require(getattr(self, name), name, dims=3, dtype=kept, device=device)
        if self.scales is not None:
            require(self.scales, "scales", dims=3, dtype=torch.bfloat16, device=device)
            heads = 2, self.kv_heads, self.keys.shape[1]
            if kept not in MOST or self.scales.shape != heads or not self.scales.is_contiguous():
                raise ValueError(f"scales must be {heads} of {[*MOST]}, got {self.scales.shape} of {kept}")

    def _check_heads(self) -> None:
        """Raise ValueError for strides, dimensions and numbers of heads that the kernels do not take."""
        if self.heads.stride(1) != self.head_dim:
            raise ValueError(f"the heads of a row must be contiguous, got strides {self.heads.stride()}")
        if self.keys.stride() != self.values.stride() or self.keys.shape != self.values.shape:
            raise ValueError("keys and values must have the same shape and strides")
        if self.keys.shape[2] != self.head_dim:
            raise ValueError(f"keys must have {self.head_dim} dimensions, got {self.keys.shape[2]}")
        if self.num_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.kv_heads} heads of keys")

    def _check_rotation(self) -> None:
        """Raise ValueError for tables of another shape than the rows', or of more than a head."""
        shape = self.heads.shape[0], self.rotary
        if self.cos.shape != shape or self.sin.shape != shape or self.cos.stride() != self.sin.stride():
            raise ValueError(f"cos and sin must be {shape}, got {self.cos.shape} and {self.sin.shape}")
        if self.rotary > self.head_dim or self.rotary % 2:
            raise ValueError(f"an even part of {self.head_dim} dimensions is rotated, got {self.rotary}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.keys.shape[0]

    @property
    def written_heads(self) -> int:
        """Heads of keys, and of values, among the heads."""
        return self.kv_heads if self.writes else 0

    @property
    def num_heads(self) -> int:
        """Heads of queries."""
        return self.heads.shape[1] - 2 * self.written_heads

    @property
    def counts(self) -> HeadCounts:
        """Return the counts that tables depend on."""
        return HeadCounts(self.num_heads, self.kv_heads, self.head_dim)

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.heads.shape[2]

    @property
    def rotary(self) -> int:
        """Dimensions that are rotated."""
        return self.cos.shape[1]
