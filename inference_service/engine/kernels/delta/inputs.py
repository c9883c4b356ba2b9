"""A layer's inputs for the gated delta rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference_service.engine.kernels.attention import Context
from inference_service.engine.kernels.launch import require, require_shape

L2_EPS = 1e-6
"""Added to the square of a query's or key's length before it is divided by the root."""


class StateChunk(NamedTuple):
    """The rows of one chunk, and where the state of their sequence is."""

    row: int
    """The chunk's first row in the batch."""
    length: int
    """Its rows."""
    slot: int
    """Slot of the states: it is read before the first row, and written behind the last."""
    fresh: bool
    """True if the sequence begins here: the slot's content is not read, and counts as zeros."""

    @classmethod
    def of(cls, context: Context) -> StateChunk:
        """Describe the chunk of a context."""
        return cls(context.row, context.length, context.slot, context.end == context.length)


@dataclass(frozen=True)
class DeltaStates:
    """The states of one layer; slots of sequences that are in no step keep what they hold."""

    conv: Tensor
    """[slots, width - 1, channels]: the last rows that the convolution was given."""
    recurrent: Tensor
    """float32 [slots, value heads, key dim, value dim]"""

    @classmethod
    def allocate(
        cls, slots: int, conv: tuple[int, int], recurrent: tuple[int, int, int], like: Tensor
    ) -> DeltaStates:
        """Zeros, on the device of a tensor; the rows have its type."""
        return cls(
            torch.zeros((slots, *conv), dtype=like.dtype, device=like.device),
            torch.zeros((slots, *recurrent), dtype=torch.float32, device=like.device),
        )


@dataclass(frozen=True)
class DeltaWeights:
    """The weights of a layer beside its linears."""

    conv: Tensor
    """[width, channels]: of the row itself comes last."""
    decay: Tensor
    """float32 [value heads]: below 0, for 1 of softplus."""
    dt_bias: Tensor
    """float32 [value heads]"""
    norm: Tensor
    """[value dim]"""
    eps: float
    """Epsilon of that norm."""


@dataclass(frozen=True)
class DeltaInputs:
    """The rows of one layer in one step: columns of fused linears, with any stride between rows."""

    qkv: Tensor
    """[T, channels]: queries and keys [key heads, key dim] each, then values [value heads, value dim]."""
    z: Tensor
    """[T, value heads * value dim]: what the output is gated with."""
    b: Tensor
    """[T, value heads]: before the sigmoid, how far a row's value takes the place of what its key finds."""
    a: Tensor
    """[T, value heads]: before softplus, how much a row lets the state decay."""
    weights: DeltaWeights
    states: DeltaStates

    def __post_init__(self) -> None:
        dtype, device, rows = self.qkv.dtype, self.qkv.device, len(self.qkv)
        heads, key_dim, value_dim = self.value_heads, self.key_dim, self.value_dim
        channels = self.qkv.shape[1]
        require(self.states.recurrent, "recurrent", dims=4, dtype=torch.float32, device=device)
        for name, tensor, shape in (
            ("qkv", self.qkv, (rows, channels)),
            ("z", self.z, (rows, heads * value_dim)),
            ("b", self.b, (rows, heads)),
            ("a", self.a, (rows, heads)),
            ("conv of the weights", self.weights.conv, (self.width, channels)),
            ("norm", self.weights.norm, (value_dim,)),
            ("conv of the states", self.states.conv, (len(self.states.recurrent), self.width - 1, channels)),
        ):
            require_shape(tensor, name, shape, dtype, device)
        for name in ("decay", "dt_bias"):
            require_shape(getattr(self.weights, name), name, (heads,), torch.float32, device)
        left = channels - heads * value_dim
        if left <= 0 or left % (2 * key_dim) or heads % (left // (2 * key_dim)):
            raise ValueError(
                f"{channels} channels are no queries, keys and values of {heads} value heads, "
                f"{key_dim} to a key and {value_dim} to a value"
            )
        for name, tensor in (("conv", self.states.conv), ("recurrent", self.states.recurrent)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name} states must be contiguous, got strides {tensor.stride()}")

    @property
    def width(self) -> int:
        """Rows that the convolution sees, the row itself included."""
        return len(self.weights.conv)

    @property
    def value_heads(self) -> int:
        """Heads of values; each has a state."""
        return self.states.recurrent.shape[1]

    @property
    def key_dim(self) -> int:
        """Dimensions of a query or a key."""
        return self.states.recurrent.shape[2]

    @property
    def value_dim(self) -> int:
        """Dimensions of a value."""
        return self.states.recurrent.shape[3]

    @property
    def key_heads(self) -> int:
        """Heads of queries, and of keys: each is shared by consecutive heads of values."""
        return (self.qkv.shape[1] - self.value_heads * self.value_dim) // (2 * self.key_dim)
