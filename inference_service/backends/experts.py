"""Mixtures of experts by one linear for each expert that has tokens, which the host asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from inference_service.kernels.experts import ByExpert, Routed, host, reference
from inference_service.layers.linear import Linear
from loramux_shared.runtime import Rounding


class Grouped(Protocol):
    """A linear of each expert."""

    def __call__(self, x: Tensor, pairs: ByExpert, *, of_tokens: bool = False) -> Tensor:
        """Return [pairs, out] of x [pairs, in] by place, or [T, in] by token."""
        ...


class _Linears(Protocol):
    """A backend, as far as linears go."""

    def new_linear(
        self, weight: Tensor, bias: Tensor | None = None, quantization: Rounding = Rounding.NONE
    ) -> Linear:
        """Return a linear of a weight [out, in]."""
        ...

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Return what a linear makes of x [T, in], [T, out]."""
        ...


class ExpertOperations:
    """Experts on a backend that has linears alone."""

    def new_grouped(
        self: _Linears,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        quantization: Rounding = Rounding.NONE,
    ) -> Grouped:
        """Return a linear of each weight [out, in]."""
        every: Sequence[Tensor | None] = biases or [None] * len(weights)
        pairs = zip(weights, every, strict=True)
        linears = [self.new_linear(weight, bias, quantization) for weight, bias in pairs]
        return OneByOne(linears, self.linear)

    def route(self, logits: Tensor, top_k: int, *, renormalised: bool) -> Routed:
        """Return the experts with the largest logits [T, E], with their probabilities."""
        return reference.route(logits, top_k, renormalised=renormalised)

    def by_expert(self, routed: Routed, num_experts: int) -> ByExpert:
        """Sort the pairs of a step."""
        return host.by_expert(routed.ids, num_experts)

    def combine(self, y: Tensor, routed: Routed, pairs: ByExpert) -> Tensor:
        """Return the weighted sums [T, N] of each token's places of y [pairs, N]."""
        each = y.index_select(0, pairs.places).view(*routed.ids.shape, -1)
        weights = routed.weights[..., None]
        out = each[:, 0] * weights[:, 0]
        for index in range(1, pairs.top_k):  # in this order, in every batch
            out += each[:, index] * weights[:, index]
        return out.to(y.dtype)

    def clamped(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """Return (up + 1) * gate * sigmoid(alpha * gate) [T, I] of both side by side, clamped before."""
        return reference.clamped(gate_up, alpha, limit, torch.float32).to(gate_up.dtype)

    def add_gated(self, out: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Add x [T, N] times the sigmoid of gate [T, 1] to out [T, N] in place."""
        return out.add_(torch.sigmoid(gate) * x)


class OneByOne:
    """A linear of each expert, one product for each that has tokens."""

    def __init__(self, linears: Sequence[Linear], product: Callable[[Linear, Tensor], Tensor]) -> None:
        self._linears, self._product = linears, product

    def __call__(self, x: Tensor, pairs: ByExpert, *, of_tokens: bool = False) -> Tensor:
        """Return [pairs, out]."""
        rows = x.index_select(0, pairs.tokens) if of_tokens else x
        parts = [
            self._product(self._linears[expert], rows[first:end]) for expert, first, end in pairs.tiles.tolist()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
