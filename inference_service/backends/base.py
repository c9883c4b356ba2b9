"""What the model and the engine ask of a backend: operations, attention, adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from inference_service.kernels.attention import Context
from inference_service.kernels.rows import Activation
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.layers.rope import Rope
from inference_service.lora.segments import Arrangement
from inference_service.lora.weights import AdapterWeights
from loramux_shared.bases.attention import AttentionSpec

Turn = tuple[Tensor, Tensor]
"""cos and sin of the step's rows, in the form that an `Attention` made them."""


class Attention(Protocol):
    """The attention of one step, shared by all layers."""

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """Prepare cos and sin [T, 1, rotary] of `Rope.at`, once per step."""
        ...

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Return [T, heads * d] of the heads of queries, keys and values, side by side [T, all heads, d].

        Queries and keys are normed first, where the layer has a norm for them.
        """
        ...


class Operations(Protocol):
    """The operations of one kind of device; T rows of all sequences stand one after the other."""

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Return what a linear makes of x [T, in], [T, out]."""
        ...

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `Rope.at` [T, 1, dim] for positions [T]."""
        ...

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """Return the rows [T, hidden] of a table by tokens [T], times a scale of the table's dtype."""
        ...

    def norm(self, hidden: Tensor, norm: RMSNorm, delta: Tensor | None, delta_norm: RMSNorm | None) -> Tensor:
        """Add delta, normed itself where it has a norm, to hidden [T, dim] in place; return hidden normed."""
        ...

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Return activation(gate) * up [T, intermediate] of both side by side."""
        ...

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Return tanh(logits / cap) * cap, for which logits may be reused."""
        ...

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """Plan the attention of a step."""
        ...

    def new_cache(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return empty keys and values of one layer, for num_rows tokens, a multiple of the block size."""
        ...


class LoraBackend(Protocol):
    """Holds the adapters' matrices, one slot each, and adds their part to the outputs of fused linears."""

    name: str
    """For the start line."""
    home: torch.device
    """Where it takes matrices in."""

    @property
    def num_bytes(self) -> int:
        """Memory that the adapters take, on the device that computes."""
        ...

    def load(self, weights: AdapterWeights) -> int:
        """Take an adapter in and return its slot; the backend keeps what it needs of the weights."""
        ...

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step, at least one of which has an adapter."""
        ...

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        ...


@dataclass(frozen=True)
class Backend:
    """What a model is run with."""

    device: torch.device
    dtype: torch.dtype
    operations: Operations
    new_lora: Callable[[], LoraBackend]
    """Makes an empty home for adapters."""
    how: str
    """For the start line: where the operations come from."""
    recordable: bool = False
    """Whether steps can be recorded and replayed: launches follow from buffers that stay where they are, and
    `new_lora` makes a `SegmentedLora`."""
