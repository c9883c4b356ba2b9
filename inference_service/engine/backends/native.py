"""The compiled operations, on a CPU."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from inference_service.engine.backends.base import Attention, Delta, LayerInputs, LayerOutputs, Layers, StepLora
from inference_service.engine.backends.native_attention import NativeAttention
from inference_service.engine.backends.native_lora import NativeLora
from inference_service.engine.backends.operations import Operations
from inference_service.engine.backends.replayed import Replays
from inference_service.engine.kernels.attention import Context
from inference_service.engine.kernels.blocks import WeightBlocks
from inference_service.engine.kernels.cpu.ops import NO_ADAPTERS, Adapters, CpuOps, Table, Tiled
from inference_service.engine.kernels.delta import StateChunk
from inference_service.engine.kernels.integers import quantize
from inference_service.engine.kernels.rows import Activation
from inference_service.engine.kernels.sampling import Drawn, RowParams
from inference_service.engine.kernels.sgmv import Update
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import LayerNorm, RMSNorm
from loramux_shared.bases.memory import Keeps
from loramux_shared.bases.rope import HeadCounts
from loramux_shared.runtime import Rounding


class NativeOperations(Operations):
    """Operations on a CPU, compiled where they exist."""

    keeps: Keeps = "blocks"

    def __init__(self, ops: CpuOps, long_rows: int | None = None) -> None:
        """Take the operations, and the rows from which on a chunk attends by torch's products."""
        super().__init__(ops.dtype, torch.device("cpu"))
        self.ops = ops
        self._long_rows = long_rows
        self._replays = Replays(ops)

    @property
    def own_products(self) -> bool:
        """Return True if linears are multiplied by the compiled product, where it takes their weights.

        Rounded ones always are: torch has no product but of widened weights.
        """
        return self.ops.multiplies

    def new_linear(
        self, weight: Tensor, bias: Tensor | None = None, quantization: Rounding = Rounding.NONE
    ) -> Linear:
        """Return a linear with a compiled product, where that is the fastest here."""
        tiled = self._tiled(weight, bias, quantization)
        if tiled is None:
            return super().new_linear(weight, bias, quantization)
        return NativeLinear(self.ops, weight.shape, tiled)

    def new_blocks(self, parts: Sequence[WeightBlocks], bias: Tensor | None = None) -> Linear:
        """Return a linear that widens them in registers, or multiplies their integers."""
        tiled = self.ops.tiled_blocks(parts, bias)
        if tiled is None:
            return super().new_blocks(parts, bias)
        return NativeLinear(self.ops, (tiled.columns, parts[0].numbers.shape[1]), tiled)

    def _tiled(self, weight: Tensor, bias: Tensor | None, quantization: Rounding) -> Tiled | None:
        """Return a weight as the compiled product takes it; None where it does not, or is not to have it."""
        quantized = quantize(weight, quantization)
        if quantized:
            return self.ops.tiled_integers(quantized, bias)
        if not self.own_products:
            return None
        return self.ops.compact(weight, bias) or self.ops.tiled(weight, bias)

    def apply_with_lora(self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str) -> Tensor:
        """Compute it in one call, where both are compiled."""
        if isinstance(layer, NativeLinear) and isinstance(lora, NativeLora):
            if self.ops.recorder is not None and self.ops.recorder.here:
                self.ops.recorder.note(lora.place(index, group))
            return layer(x, lora.adapters(index, group))
        return super().apply_with_lora(layer, x, lora, index, group)

    def norm(
        self,
        hidden: Tensor,
        norm: RMSNorm,
        delta: Tensor | None,
        delta_norm: RMSNorm | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum and its norm in one pass; rows that may lie apart are normed where they are."""
        if out is hidden and delta is None and not isinstance(norm, LayerNorm):
            self.ops.norm_heads(hidden, norm.weight[None], norm.eps, norm.offset)
            return out
        if delta is not None and delta_norm is not None:
            delta = self._normed(delta, delta_norm, None)
        normed = self._normed(hidden, norm, delta)
        return normed if out is None else out.copy_(normed)

    def _normed(self, rows: Tensor, norm: RMSNorm, delta: Tensor | None) -> Tensor:
        if isinstance(norm, LayerNorm):
            return self.ops.layer_norm(rows, delta, norm.weight, norm.bias, norm.eps)
        return self.ops.rms_norm(rows, delta, norm.weight, norm.eps, norm.offset)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Compute it in one pass."""
        return self.ops.add(out, x)

    def scale(self, out: Tensor, factor: float) -> Tensor:
        """Compute it in one pass."""
        return self.ops.add(out, None, factor)

    def gated(self, gate_up: Tensor, activation: Activation, update: Update | None = None) -> Tensor:  # noqa: ARG002 - nothing is deferred here
        """Compute it in one pass."""
        return self.ops.activated(gate_up, activation, gated=True)

    def activated(self, x: Tensor, activation: Activation, update: Update | None = None) -> Tensor:  # noqa: ARG002 - nothing is deferred here
        """Compute it in one pass."""
        return self.ops.activated(x, activation)

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """Over the cache where it lies."""
        return NativeAttention(self.ops, contexts, block_size, self._long_rows, windows)

    def run_layers(self, layers: Layers, inputs: LayerInputs) -> LayerOutputs:
        """Replay what ran before for a step of the same shape."""
        return self._replays(layers, inputs)

    def recurrence(self, chunks: Sequence[StateChunk]) -> Delta:
        """Return a recurrence with one call for each layer."""
        return partial(self.ops.gated_delta, chunks=Table(np.array(chunks, dtype=np.int64)))

    def draw(self, logits: Tensor, rows: Sequence[RowParams]) -> Drawn:
        """Draw all rows in one call."""
        return self.ops.draw(logits, rows)

    def scores(self, logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        """Score all rows in one call."""
        return self.ops.scores(logits, ids, count)

    def new_cache(self, num_rows: int, heads: HeadCounts) -> tuple[Tensor, Tensor]:
        """Return a cache in the order in which the compiled attention reads it."""
        return self.ops.new_cache(heads.kv, num_rows, heads.dim)


class NativeLinear(Linear):
    """A linear with its weights in tiles, which a compiled product reads from front to back."""

    def __init__(self, ops: CpuOps, shape: Sequence[int], tiled: Tiled) -> None:
        """Take a weight [out, in] as the product reads it."""
        self.out_features, self.in_features = shape
        self._ops, self._tiled = ops, tiled
        whole = self.out_features * self.in_features * ops.dtype.itemsize
        self.saved_bytes = whole - tiled.num_bytes if tiled.saves else 0

    def __call__(self, x: Tensor, adapters: Adapters = NO_ADAPTERS) -> Tensor:
        """Return [T, out], with what adapters add to it."""
        return self._ops.linear(x, self._tiled, adapters)
