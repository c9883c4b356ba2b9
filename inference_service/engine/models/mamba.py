"""The blocks of layers with Mamba-2, with their weights."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from inference_service.engine.kernels.delta import DeltaStates
from inference_service.engine.models.blocks import (
    AttentionBlock,
    Blocks,
    CacheSize,
    LayerCache,
    MixerBlock,
    Mlp,
    MlpBlock,
    Step,
)
from inference_service.engine.models.experts import ExpertsBlock
from inference_service.engine.models.mamba_scan import MambaWeights, mamba
from inference_service.engine.models.reader import LayerReader
from loramux_shared.bases.mamba_layers import (
    UNSCALED,
    MambaLayer,
    MlpMixer,
    NoMlp,
    ScaledMlp,
    SharedLayer,
    SideLayer,
)
from loramux_shared.faults import InternalFault


class MambaBlock(MixerBlock):
    """Reads each sequence's state, and takes it behind the step's rows."""

    def __init__(self, reader: LayerReader, spec: MambaLayer) -> None:
        """Read the weights."""
        at, exact = reader.config.path("mamba_in").removesuffix("in_proj"), torch.float32
        self._index, self._spec = reader.index, spec
        self._in_group, self._out_group = (reader.group(name).name for name in ("mamba_in", "mamba_out"))
        self.inside = reader.linear("mamba_in", (f"{at}in_proj",), bias=spec.in_bias)
        self.out = reader.linear("mamba_out", (f"{at}out_proj",), bias=spec.out_bias)
        channels, heads = (spec.channels,), (spec.heads,)
        taps = reader.get(f"{at}conv1d.weight", (spec.channels, 1, spec.conv_width), exact)
        normed = spec.gating != "alone"
        self._weights = MambaWeights(
            conv=taps.squeeze(1).t().contiguous(),
            conv_bias=reader.get(f"{at}conv1d.bias", channels, exact) if spec.conv_bias else None,
            decay=-reader.get(f"{at}A_log", heads, exact).exp(),
            dt_bias=reader.get(f"{at}dt_bias", heads, exact),
            skip=reader.get(f"{at}D", heads, exact),
            norm=reader.get(f"{at}norm.weight", (spec.features,), exact) if normed else None,
            eps=reader.config.norm_eps,
        )
        self._like = reader.reader.rounded(taps[:0])
        self._scales = None
        if spec.part_scales != UNSCALED:
            pairs = zip(spec.parts, spec.part_scales, strict=True)
            scales = [taps.new_full((width,), scale) for width, scale in pairs]
            self._scales = reader.reader.rounded(torch.cat(scales))

    def new_states(self, size: CacheSize) -> LayerCache:
        """Return the rows that the convolution keeps, and the states: of every slot."""
        states = DeltaStates.allocate(size.slots, self._spec.conv_shape, self._spec.state_shape, self._like)
        return states.conv, states.recurrent

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        spec, chunks = self._spec, step.recurrence.chunks
        if not chunks:
            raise InternalFault("a layer has a Mamba-2 mixer, and the step has planned for none")
        rows = step.linear(self.inside, _times(x, spec.in_scale), self._index, self._in_group)
        if self._scales is not None:
            rows = rows * self._scales
        states = DeltaStates(*step.cache.states[self._index])
        mixed = mamba(rows, spec, self._weights, states, chunks, by_row=step.operations.by_row)
        return _times(step.linear(self.out, mixed, self._index, self._out_group), spec.out_scale)


class SideBlock(AttentionBlock):
    """Attention, and a Mamba-2 mixer beside it."""

    def __init__(self, reader: LayerReader, spec: SideLayer) -> None:
        """Read the weights."""
        super().__init__(reader, spec)
        self._scales = spec.in_scale, spec.out_scale
        self._mamba = MambaBlock(reader, spec.mamba)
        self._mamba_in, self._mamba_out = self._mamba.inside, self._mamba.out  # counted among its linears

    def new_states(self, size: CacheSize) -> LayerCache:
        """Return the states of the mixer."""
        return self._mamba.new_states(size)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        before, behind = self._scales
        mixed = self._mamba(step, x)
        return mixed + _times(super().__call__(step, _times(x, before)), behind)


class MlpMixerBlock(MixerBlock):
    """max(0, up x)^2, and down again."""

    def __init__(self, reader: LayerReader, _: MlpMixer) -> None:
        """Read the weights."""
        names, bias = reader.config.names, reader.config.mlp_bias
        self._index = reader.index
        self._groups = [reader.group(name).name for name in ("mlp_h_to_4h", "mlp_4h_to_h")]
        self._up = reader.linear("mlp_h_to_4h", names.gate_up, bias=bias)
        self._down = reader.linear("mlp_4h_to_h", (names.down,), bias=bias)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        up, down = self._groups
        squares = step.linear(self._up, x, self._index, up).relu().square()
        return step.linear(self._down, squares, self._index, down)


class NoMlpBlock:
    """Zeros: what is added behind a layer of a mixer alone."""

    def __init__(self, *_: object) -> None:
        """Read nothing."""

    def __call__(self, step: Step, x: Tensor) -> Tensor:  # noqa: ARG002 - as the others
        """Return [T, hidden] for x [T, hidden]."""
        return torch.zeros_like(x)


class ScaledMlpBlock:
    """silu(gate x times a factor) * up x, and down again, times another one."""

    def __init__(self, reader: LayerReader, spec: ScaledMlp) -> None:
        """Read the weights."""
        names, bias = reader.config.names, reader.config.mlp_bias
        self._index, self._spec = reader.index, spec
        self._groups = [reader.group(name).name for name in ("mlp_h_to_4h", "mlp_4h_to_h")]
        self._gate_up = reader.linear("mlp_h_to_4h", names.gate_up, bias=bias)
        self._down = reader.linear("mlp_4h_to_h", (names.down,), bias=bias)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        up, down = self._groups
        both = step.linear(self._gate_up, x, self._index, up)
        if self._spec.gate_scale != 1.0:
            both[:, : self._spec.intermediate] *= self._spec.gate_scale
        gated = step.operations.gated(both, "silu")
        return _times(step.linear(self._down, gated, self._index, down), self._spec.out_scale)


class SharedBlock:
    """Experts, and an MLP of all rows; it takes the hidden rows as they are, and norms them itself."""

    def __init__(self, reader: LayerReader, spec: SharedLayer) -> None:
        """Read the weights."""
        self._norm = reader.norm(reader.config.names.mlp_norm or "")
        self._experts, self._mlp = ExpertsBlock(reader, spec), MlpBlock.of_layer(reader)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for hidden rows x [T, hidden]."""
        normed = step.operations.norm(x, self._norm, None, None)
        return self._experts(step, normed).add_(self._mlp(step, normed))


def _times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


MIXERS: Final[Blocks[MixerBlock]] = {MambaLayer: MambaBlock, SideLayer: SideBlock, MlpMixer: MlpMixerBlock}
MLPS: Final[Blocks[Mlp]] = {NoMlp: NoMlpBlock, ScaledMlp: ScaledMlpBlock, SharedLayer: SharedBlock}
