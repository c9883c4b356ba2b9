"""The values that all layers of a forward pass share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inference_service.backends.base import Attention, Operations, Recurrence, StepLora, Turn, no_recurrence
from inference_service.kernels.sgmv import Update
from inference_service.layers.linear import Linear

LayerCache = tuple[Tensor, ...]
"""A layer's cache of its sequences, as its mixer made it."""


@dataclass(frozen=True)
class CacheSize:
    """The size of the layers' caches."""

    rows: tuple[int, ...]
    """Tokens of each group of layers that see equally far, multiples of the block size; in the order of the
    windows of the config."""
    slots: int = 0
    """Slots for the states of sequences, in layers that carry one."""


@dataclass(frozen=True, eq=False)
class Cache:
    """The caches of all layers."""

    layers: tuple[LayerCache, ...]
    states: tuple[Tensor, ...] = ()
    """Those of their tensors that are states [slots, ...]."""

    def copy_states(self, read: Tensor, written: Tensor) -> None:
        """Copy states from slots [n] to others [n]; all are read before any is written."""
        for state in self.states:
            state.index_copy_(0, written, state.index_select(0, read))


@dataclass(frozen=True)
class Step:
    """A forward pass under way."""

    operations: Operations
    attention: Attention
    cache: Cache
    lora: StepLora | None
    turns: tuple[Turn, ...]
    """Rotations of each of the decoder's ropes."""
    query_factors: Tensor | None
    """Factors of the queries, [T, 1]; None: no scaling."""
    recurrence: Recurrence = no_recurrence

    def linear(self, layer: Linear, x: Tensor, index: int, group: str) -> Tensor:
        """Return what a fused linear of layer ``index`` makes of x [T, in], adapters included."""
        if self.lora is None:
            return self.operations.linear(layer, x)
        return self.operations.adapted(layer, x, self.lora, index, group)

    def begun(self, layer: Linear, x: Tensor, index: int, group: str) -> tuple[Tensor, Update | None]:
        """Return the same, or without adapters, whose update is for the operation that reads it."""
        if self.lora is None:
            return self.operations.linear(layer, x), None
        return self.operations.begun(layer, x, self.lora, index, group)
