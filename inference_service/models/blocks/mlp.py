"""A gated MLP."""

from __future__ import annotations

from torch import Tensor

from inference_service.models.reader import LayerReader
from inference_service.models.step import Step


class MlpBlock:
    """activation(gate x) * up x, and down again."""

    def __init__(self, reader: LayerReader) -> None:
        """Read the weights.

        Raises:
            CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
        """
        config = reader.config
        self._index = reader.index
        self._activation = config.activation
        self._up_group, self._down_group = (reader.group(name).name for name in ("mlp_gate", "mlp_4h_to_h"))
        self._gate_up = reader.linear("mlp_gate", config.names.gate_up, bias=config.mlp_bias)
        self._down = reader.linear("mlp_4h_to_h", (config.names.down,), bias=config.mlp_bias)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        gate_up = step.linear(self._gate_up, x, self._index, self._up_group)
        gated = step.operations.gated(gate_up, self._activation)
        return step.linear(self._down, gated, self._index, self._down_group)
