"""What all layers of a forward pass share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inference_service.backends.base import Attention, Operations, StepLora, Turn
from inference_service.layers.linear import Linear

LayerCache = tuple[Tensor, ...]
"""What a layer keeps of its sequences, as its mixer made it."""


@dataclass(frozen=True)
class Cache:
    """What all layers keep of their sequences."""

    layers: tuple[LayerCache, ...]


@dataclass(frozen=True)
class Step:
    """A forward pass under way."""

    operations: Operations
    attention: Attention
    cache: Cache
    lora: StepLora | None
    turns: tuple[Turn, ...]
    """Of each of the decoder's ropes."""
    growth: Tensor | None
    """What queries are multiplied with [T, 1]; None: nothing."""

    def linear(self, layer: Linear, x: Tensor, index: int, group: str) -> Tensor:
        """Return what a fused linear of layer ``index`` makes of x [T, in], adapters included."""
        if self.lora is None:
            return self.operations.linear(layer, x)
        return self.operations.adapted(layer, x, self.lora, index, group)
