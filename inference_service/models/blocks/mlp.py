"""A gated MLP."""

from __future__ import annotations

from torch import Tensor

from inference_service.models.reader import LayerReader
from inference_service.models.step import Step

Place = tuple[str, tuple[str, ...]]
"""A module of a fused linear, and the names of its tensors, as `LayerReader.linear` takes them."""


class MlpBlock:
    """activation(gate x) * up x, and down again."""

    def __init__(self, reader: LayerReader, gate_up: Place, down: Place, *, bias: bool) -> None:
        """Read the weights of two linears.

        Raises:
            CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
        """
        self._index = reader.index
        self._activation = reader.config.activation
        self._up_group, self._down_group = (reader.group(module).name for module, _ in (gate_up, down))
        self._gate_up = reader.linear(*gate_up, bias=bias)
        self._down = reader.linear(*down, bias=bias)

    @classmethod
    def of_layer(cls, reader: LayerReader) -> MlpBlock:
        """Read that of a layer."""
        config = reader.config
        names, bias = config.names, config.mlp_bias
        return cls(reader, ("mlp_gate", names.gate_up), ("mlp_4h_to_h", (names.down,)), bias=bias)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        gate_up, update = step.begun(self._gate_up, x, self._index, self._up_group)
        gated = step.operations.gated(gate_up, self._activation, update)
        return step.linear(self._down, gated, self._index, self._down_group)
