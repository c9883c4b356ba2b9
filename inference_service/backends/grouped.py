"""Mixtures of experts by the kernels for GPUs: one launch for all experts, which the host does not ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference_service.backends.experts import ExpertOperations, Grouped
from inference_service.kernels import experts
from inference_service.kernels.experts import ByExpert, Routed
from loramux_shared.runtime import Rounding


class GroupedOperations(ExpertOperations):
    """Experts on a backend that has grouped products."""

    def new_grouped(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        quantization: Rounding = Rounding.NONE,  # noqa: ARG002 - the kernel multiplies whole values
    ) -> Grouped:
        """Return a linear of each weight [out, in], all in one piece."""
        return AtOnce(torch.stack([*weights]), None if biases is None else torch.stack([*biases]))

    def route(self, logits: Tensor, top_k: int, *, renormalised: bool) -> Routed:
        """Route in one launch."""
        return experts.route(logits, top_k, renormalised=renormalised)

    def by_expert(self, routed: Routed, num_experts: int) -> ByExpert:
        """Sort by expert in one launch."""
        return experts.by_expert(routed.ids, num_experts)

    def combine(self, y: Tensor, routed: Routed, pairs: ByExpert) -> Tensor:
        """Combine in one launch."""
        return experts.combine(y, routed, pairs)

    def clamped(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """Compute the clamped gate in one launch."""
        return experts.clamped(gate_up, alpha, limit)


class AtOnce:
    """A linear of each expert, one launch for all."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take weights [E, out, in] and biases [E, out]."""
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor, pairs: ByExpert, *, of_tokens: bool = False) -> Tensor:
        """Return [pairs, out]."""
        return experts.grouped(x, self._weight, pairs, self._bias, of_tokens=of_tokens)
