"""The input that tokens give to layers directly, beside the hidden rows."""

from __future__ import annotations

import torch
from torch import Tensor

from inference_service.backends.base import Operations
from inference_service.models.reader import LayerReader, Reader
from inference_service.models.step import Step
from loramux_shared.bases.layers import InputLayer


class Inputs:
    """The inputs of all layers, made once for a step: rows of a table, and a projection of the embedding."""

    def __init__(self, reader: Reader, spec: InputLayer) -> None:
        """Read the weights.

        Raises:
            CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
        """
        dims, names = reader.config.dims, reader.config.names.inputs
        self._layers, self._width = dims.num_layers, spec.width
        widths = dims.num_layers * spec.width
        self._table = reader.rounded(reader.get(f"{names.table}.weight", (spec.vocab, widths)))
        # Rounded as the weights are, as the scale of the embedding is.
        self._table_scale = float(reader.rounded(torch.tensor(spec.width**0.5)))
        projection = reader.get(f"{names.projection}.weight", (widths, dims.hidden))
        self._projection = reader.operations.new_linear(reader.rounded(projection), None)
        self._scale = dims.hidden**-0.5
        self._norm = reader.norm(names.norm, spec.width)

    def __call__(self, operations: Operations, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return [T, layers, width] for tokens [T] and their embeddings [T, hidden]."""
        embedded = operations.embed(tokens, self._table, self._table_scale)
        projected = operations.linear(self._projection, hidden).mul_(self._scale)
        projected = operations.norm(projected.view(-1, self._width), self._norm, None, None)
        return (
            (projected.view_as(embedded) + embedded).mul_(2**-0.5).view(len(tokens), self._layers, self._width)
        )


class InputBlock:
    """Lets a layer's inputs in: a gate of the hidden rows, and a projection back to them."""

    def __init__(self, reader: LayerReader) -> None:
        """Read the weights.

        Raises:
            CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
        """
        names = reader.config.names.inputs
        self._index = reader.index
        self._activation = reader.config.activation
        self._gate = reader.linear("layer_input_gate", (names.gate,))
        self._projection = reader.linear("layer_input_projection", (names.layer_projection,))
        self.out_norm = reader.norm(names.out_norm)

    def __call__(self, step: Step, x: Tensor, inputs: Tensor) -> Tensor:
        """Return [T, hidden] for hidden rows x [T, hidden] and the inputs [T, layers, width]."""
        gate = step.linear(self._gate, x, self._index, "layer_input_gate")
        both = torch.cat([gate, inputs[:, self._index]], dim=1)
        gated = step.operations.gated(both, self._activation)
        return step.linear(self._projection, gated, self._index, "layer_input_projection")
