"""What the engine asks of a LoRA backend."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from inference_service.lora.segments import Arrangement
from inference_service.lora.weights import AdapterWeights


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
