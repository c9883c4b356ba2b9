"""What a step computes beside its adapters' part, for each kind of device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, silu

from inference_service.backends.attention import Attention, NativeAttention, TorchAttention, TritonAttention
from inference_service.kernels import rows
from inference_service.kernels.attention import (
    AttentionCapacity,
    AttentionTables,
    Context,
    PagedAttention,
    pack_tables,
    prefill_tile,
)
from inference_service.kernels.cpu.ops import CpuOps
from inference_service.kernels.rows import Activation
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.layers.rope import Rope
from loramux_shared.bundle.modules import BaseDims

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


class Operations(Protocol):
    """The operations of one kind of device; T rows of all sequences stand one after the other."""

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Return what a linear makes of x [T, in], [T, out]."""
        ...

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `Rope.at` [T, 1, dim] for positions [T]."""
        ...

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """Return the rows [T, hidden] of a table by tokens [T], times a scale of the table's dtype."""
        ...

    def norm(self, hidden: Tensor, norm: RMSNorm, delta: Tensor | None, delta_norm: RMSNorm | None) -> Tensor:
        """Add delta, normed itself where it has a norm, to hidden [T, dim] in place; return hidden normed."""
        ...

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Return activation(gate) * up [T, intermediate] of both side by side."""
        ...

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Return tanh(logits / cap) * cap, for which logits may be reused."""
        ...

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """Plan the attention of a step."""
        ...

    def new_cache(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return empty keys and values of one layer, for num_rows tokens, a multiple of the block size."""
        ...


class TorchOperations:
    """In plain torch, on any device."""

    def __init__(
        self,
        dims: BaseDims,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        """Take the sizes of the model, and the windows of its layers."""
        self._num_heads, self._kv_heads, self._head_dim = dims.num_heads, dims.num_kv_heads, dims.head_dim
        self._dtype = dtype
        self._device = device
        self._windows = windows

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """All rows at once."""
        return layer(x)

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """All positions at once."""
        return rope.at(positions)

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """In one or two operations."""
        hidden = embedding(tokens, table)
        return hidden if scale == 1.0 else hidden * scale

    def norm(self, hidden: Tensor, norm: RMSNorm, delta: Tensor | None, delta_norm: RMSNorm | None) -> Tensor:
        """One after the other."""
        if delta is not None:
            hidden += delta if delta_norm is None else delta_norm(delta)
        return norm(hidden)

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Two operations."""
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Three operations."""
        return torch.tanh(logits / cap) * cap

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """Gather the contexts, once for all layers of a window."""
        groups = self._num_heads // self._kv_heads
        plan = PagedAttention(contexts, block_size, groups, self._dtype, self._device, self._windows)
        return TorchAttention(plan, self._num_heads, self._kv_heads)

    def new_cache(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """[kv heads, rows, d] each."""
        shape = self._kv_heads, num_rows, self._head_dim
        keys, values = (torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        return keys, values


class NativeOperations(TorchOperations):
    """With compiled operations where there are some, on a CPU."""

    def __init__(self, ops: CpuOps, dims: BaseDims) -> None:
        super().__init__(dims, ops.dtype, torch.device("cpu"))
        self.ops = ops

    def norm(self, hidden: Tensor, norm: RMSNorm, delta: Tensor | None, delta_norm: RMSNorm | None) -> Tensor:
        """The sum and its norm in one pass."""
        if delta is not None and delta_norm is not None:
            delta = self.ops.rms_norm(delta, None, delta_norm.weight, delta_norm.eps, delta_norm.offset)
        return self.ops.rms_norm(hidden, delta, norm.weight, norm.eps, norm.offset)

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """In one pass."""
        return self.ops.gated(gate_up, activation)

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """Over the cache where it lies."""
        return NativeAttention(self.ops, contexts, block_size, self._num_heads, self._kv_heads)

    def new_cache(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """In the order in which the compiled attention reads it."""
        return self.ops.new_cache(self._kv_heads, num_rows, self._head_dim)


class TritonOperations(TorchOperations):
    """One launch each, on a GPU or in Triton's interpreter."""

    def __init__(self, dims: BaseDims, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dims, dtype, device)
        self._tables: dict[AttentionCapacity, AttentionTables] = {}

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """The scale included."""
        return rows.embed(tokens, table, scale)

    def norm(self, hidden: Tensor, norm: RMSNorm, delta: Tensor | None, delta_norm: RMSNorm | None) -> Tensor:
        """Both norms and the sum."""
        weight = None if delta_norm is None else delta_norm.weight
        return rows.rms_norm(
            hidden, norm.weight, eps=norm.eps, offset=norm.offset, delta=delta, delta_weight=weight
        )

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """The product included."""
        return rows.gated(gate_up, activation)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """In place."""
        rows.softcap(logits, cap)
        return logits

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """From tables that are kept for steps of the same size class."""
        num_rows = max(context.row + context.length for context in contexts)
        longest = max(-(-context.end // block_size) for context in contexts)
        mixed = any(context.length > 1 for context in contexts)
        tile = prefill_tile(self._device, self._dtype, self._head_dim, self._num_heads // self._kv_heads)
        capacity = AttentionCapacity(
            rows=_class_of(num_rows),
            chunks=_class_of(len(contexts)),
            blocks_per_chunk=_class_of(longest),
            block_size=block_size,
            tile=tile if mixed else None,
        )
        if capacity not in self._tables:
            self._tables[capacity] = AttentionTables.allocate(capacity, self._device)
        tables = self._tables[capacity]
        tables.load(torch.from_numpy(pack_tables(capacity, contexts)))
        return TritonAttention(tables)


def _class_of(number: int) -> int:
    """The power of two that holds a number, so that there are few tables and few kinds of launches."""
    return 1 << (number - 1).bit_length()
