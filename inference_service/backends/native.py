"""The compiled operations, on a CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from inference_service.backends.base import Attention, Recurrence, StepLora, Turn
from inference_service.backends.long_chunks import LongChunk, split
from inference_service.backends.native_lora import NativeLora
from inference_service.backends.torch import TorchOperations, normed, parts
from inference_service.core.sequence import GONE
from inference_service.kernels.attention import Context
from inference_service.kernels.cpu.ops import (
    BLOCK,
    NO_ADAPTERS,
    Adapters,
    Chunks,
    CpuOps,
    Planned,
    Table,
    Tiled,
)
from inference_service.kernels.delta import StateChunk
from inference_service.kernels.integers import quantize
from inference_service.kernels.rows import Activation
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from loramux_shared.bases.attention import AttentionSpec, HeadCounts
from loramux_shared.rounding import Rounding


class NativeOperations(TorchOperations):
    """Operations on a CPU, compiled where they exist."""

    def __init__(self, ops: CpuOps, long_rows: int | None = None) -> None:
        """Take the operations, and the rows from which on a chunk attends by torch's products."""
        super().__init__(ops.dtype, torch.device("cpu"))
        self.ops = ops
        self._long_rows = long_rows

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
        return NativeLinear(self.ops, weight, tiled)

    def _tiled(self, weight: Tensor, bias: Tensor | None, quantization: Rounding) -> Tiled | None:
        """Return a weight as the compiled product takes it; None where it does not, or is not to have it."""
        quantized = quantize(weight, quantization)
        if quantized:
            return self.ops.tiled_integers(quantized, bias)
        return self.ops.tiled(weight, bias) if self.own_products else None

    def adapted(self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str) -> Tensor:
        """Compute it in one call, where both are compiled."""
        if isinstance(layer, NativeLinear) and isinstance(lora, NativeLora):
            return layer(x, lora.adapters(index, group))
        return super().adapted(layer, x, lora, index, group)

    def norm(
        self,
        hidden: Tensor,
        norm: RMSNorm,
        delta: Tensor | None,
        delta_norm: RMSNorm | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum and its norm in one pass."""
        if delta is not None and delta_norm is not None:
            delta = self.ops.rms_norm(delta, None, delta_norm.weight, delta_norm.eps, delta_norm.offset)
        normed = self.ops.rms_norm(hidden, delta, norm.weight, norm.eps, norm.offset)
        return normed if out is None else out.copy_(normed)

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Compute it in one pass."""
        return self.ops.gated(gate_up, activation)

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """Over the cache where it lies."""
        return NativeAttention(self.ops, contexts, block_size, self._long_rows, windows)

    def recurrence(self, contexts: Sequence[Context]) -> Recurrence:
        """Return a recurrence with one call for each layer."""
        chunks = np.array([StateChunk.of(context) for context in contexts], dtype=np.int64)
        return partial(self.ops.gated_delta, chunks=Table(chunks))

    def new_cache(self, num_rows: int, heads: HeadCounts) -> tuple[Tensor, Tensor]:
        """Return a cache in the order in which the compiled attention reads it."""
        return self.ops.new_cache(heads.kv, num_rows, heads.dim)


class NativeLinear(Linear):
    """A linear with its weights in tiles, which a compiled product reads from front to back."""

    def __init__(self, ops: CpuOps, weight: Tensor, tiled: Tiled) -> None:
        self.out_features, self.in_features = weight.shape
        self._ops, self._tiled = ops, tiled

    def __call__(self, x: Tensor, adapters: Adapters = NO_ADAPTERS) -> Tensor:
        """Return [T, out], with what adapters add to it."""
        return self._ops.linear(x, self._tiled, adapters)


@dataclass(frozen=True)
class _Plan:
    """The rows that a step's rows attend to, for the layers of a group."""

    cache_rows: Tensor
    """[T]: where their keys and values go."""
    chunks: Chunks
    short: Chunks
    """Those that do not attend by torch's products, where that is possible."""
    long: list[LongChunk]

    @classmethod
    def make(
        cls,
        contexts: Sequence[Context],
        group: int,
        block_size: int,
        dtype: torch.dtype,
        long_rows: int | None,
    ) -> _Plan:
        """Plan a group of layers."""
        rows: list[int] = []
        planned: list[Planned] = []
        for context in contexts:
            blocks = context.table(group)
            positions = range(context.end - context.length, context.end)
            rows += [blocks[at // block_size] * block_size + at % block_size for at in positions]
            planned.append((context.row, context.length, context.end, _small(blocks, block_size // BLOCK)))
        chunks = Chunks.make(planned)
        short, long = split(planned, long_rows, dtype)
        return cls(torch.tensor(rows, dtype=torch.int64), chunks, Chunks.make(short) if long else chunks, long)


def _small(blocks: Sequence[int], parts: int) -> Sequence[int]:
    """Return the compiled operation's blocks, of which an engine's block has so many parts.

    It begins at a multiple of some blocks and gives what is before the window no weight, but reads it: that
    must be there. So the sequence's own last block stands for those that are gone.
    """
    if parts == 1 and blocks[0] != GONE:
        return blocks
    each = np.array(blocks, dtype=np.int32)
    each[each == GONE] = blocks[-1]
    return array("i", np.add.outer(each * parts, np.arange(parts, dtype=np.int32)).astype(np.int32).tobytes())


class NativeAttention:
    """Attention with the compiled operations.

    Nothing is gathered or copied, but for long chunks where that pays.
    """

    def __init__(
        self,
        ops: CpuOps,
        contexts: Sequence[Context],
        block_size: int,
        long_rows: int | None = None,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        self._ops = ops
        self._plans = {
            window: _Plan.make(contexts, group, block_size, ops.dtype, long_rows)
            for group, window in enumerate(windows)
        }

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """float32 [T, rotary]."""
        return cos.squeeze(1).float().contiguous(), sin.squeeze(1).float().contiguous()

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rotate in place, write the cache, attend over it where it lies."""
        queries, rotated = parts(heads, len(keys), spec)
        if norm is not None:
            heads = normed(heads, len(norm.weight), partial(self._normed, norm))
        q, k, v = heads[:, :queries], heads[:, queries:rotated], heads[:, rotated:]
        plan = self._plans[spec.window]
        self._ops.rope_write(q, k, v, *turn, plan.cache_rows, keys, values)
        bounded = spec.window is not None or spec.softcap is not None or sinks is not None
        chunks, long = (plan.chunks, []) if bounded else (plan.short, plan.long)
        out = self._ops.attention(
            q,
            chunks,
            keys,
            values,
            queries // len(keys),
            spec.scale,
            spec.softcap or 0.0,
            spec.window or 0,
            sinks,
        )
        for chunk in long:
            chunk.attend(self._ops, q, keys, values, spec.scale, out)
        return out

    def _normed(self, norm: RMSNorm, heads: Tensor) -> Tensor:
        rows = heads.reshape(-1, heads.shape[-1])
        return self._ops.rms_norm(rows, None, norm.weight, norm.eps, norm.offset).view_as(heads)
