"""A gated delta rule."""

from __future__ import annotations

import torch
from torch import Tensor

from inference_service.backends.base import Operations
from inference_service.kernels.delta import DeltaInputs, DeltaStates, DeltaWeights
from inference_service.models.reader import LayerReader
from inference_service.models.step import CacheSize, LayerCache, Step
from loramux_shared.bases.layers import DeltaLayer


class DeltaBlock:
    """Reads each sequence's state, and takes it behind the step's rows."""

    stateful = True

    def __init__(self, reader: LayerReader, spec: DeltaLayer) -> None:
        """Read the weights.

        Raises:
            CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
        """
        names, rounded = reader.config.names.delta, reader.reader.rounded
        self._index = reader.index
        self._spec = spec
        group, out = reader.group("delta_qkv"), reader.group("delta_out")
        self._in_group, self._out_group, self._parts = group.name, out.name, list(group.out_features)
        self._in = reader.linear("delta_qkv", names.inputs)
        self._out = reader.linear("delta_out", (names.out,))
        heads = (spec.value_heads,)
        taps = reader.get(names.conv, (spec.channels, 1, spec.conv_width)).squeeze(1)
        self._weights = DeltaWeights(
            conv=rounded(taps.t()).contiguous(),
            decay=-rounded(reader.get(names.decay, heads)).float().exp(),
            dt_bias=rounded(reader.get(names.dt_bias, heads)).float(),
            norm=rounded(reader.get(f"{names.norm}.weight", (spec.value_dim,))),
            eps=reader.config.norm_eps,
        )

    def new_cache(self, operations: Operations, size: CacheSize) -> LayerCache:  # noqa: ARG002 - states are alike everywhere
        """Return the rows that the convolution keeps, and the states: of every slot."""
        spec = self._spec
        states = DeltaStates.allocate(size.slots, spec.conv_shape, spec.state_shape, like=self._weights.conv)
        return states.conv, states.recurrent

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        fused = step.linear(self._in, x, self._index, self._in_group)
        qkv, z, b, a = torch.split(fused, self._parts, dim=1)
        states = DeltaStates(*step.cache.layers[self._index])
        mixed = step.recurrence(DeltaInputs(qkv, z, b, a, self._weights, states))
        return step.linear(self._out, mixed, self._index, self._out_group)
