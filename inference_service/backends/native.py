"""The compiled operations, on a CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inference_service.backends.base import Attention, Turn
from inference_service.backends.torch import TorchOperations
from inference_service.kernels.attention import Context
from inference_service.kernels.cpu.ops import ADAPTER_FIELDS, BLOCK, Chunks, CpuOps, Table, pack_a, pack_b
from inference_service.kernels.rows import Activation
from inference_service.layers.norm import RMSNorm
from inference_service.lora.segments import Arrangement
from inference_service.lora.weights import AdapterWeights, GroupWeights
from loramux_shared.bases.attention import AttentionSpec
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bundle.modules import BaseDims


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


class NativeAttention:
    """With the compiled operations: nothing is gathered, nothing is copied."""

    def __init__(
        self, ops: CpuOps, contexts: Sequence[Context], block_size: int, num_heads: int, num_kv_heads: int
    ) -> None:
        self._ops = ops
        self._num_heads = num_heads
        self._rotated = num_heads + num_kv_heads
        self._group = num_heads // num_kv_heads
        parts = block_size // BLOCK
        rows: list[int] = []
        planned = []
        for context in contexts:
            blocks = context.blocks
            positions = range(context.end - context.length, context.end)
            rows += [blocks[at // block_size] * block_size + at % block_size for at in positions]
            small = blocks
            if parts > 1:
                each = np.add.outer(np.array(blocks) * parts, np.arange(parts))
                small = array("i", each.astype(np.int32).tobytes())
            planned.append((context.row, context.length, context.end, small))
        self._cache_rows = torch.tensor(rows, dtype=torch.int64)
        self._chunks = Chunks.make(planned)

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
    ) -> Tensor:
        """Rotate in place, write the cache, attend over it where it lies."""
        if norm is not None:
            heads = self._normed(heads, norm)
        q = heads[:, : self._num_heads]
        k, v = heads[:, self._num_heads : self._rotated], heads[:, self._rotated :]
        self._ops.rope_write(q, k, v, *turn, self._cache_rows, keys, values)
        return self._ops.attention(
            q, self._chunks, keys, values, self._group, spec.scale, spec.softcap or 0.0, spec.window or 0
        )

    def _normed(self, heads: Tensor, norm: RMSNorm) -> Tensor:
        """Norm the heads of queries and keys, not those of values."""
        rotated = heads[:, : self._rotated]
        rows = rotated.reshape(-1, rotated.shape[-1])
        normed = self._ops.rms_norm(rows, None, norm.weight, norm.eps, norm.offset)
        return torch.cat([normed.view_as(rotated), heads[:, self._rotated :]], dim=1)


class NativeLora:
    """Adds the adapters' part to the output of a fused linear: one call, exact ranks, no packing per step."""

    name = "native"
    home = torch.device("cpu")

    def __init__(self, ops: CpuOps, groups: tuple[GroupShape, ...], num_layers: int) -> None:
        self._ops = ops
        self._groups = {group.name: group for group in groups}
        self._tables = {
            (layer, group.name): Table(np.zeros((0, ADAPTER_FIELDS), dtype=np.int64))
            for layer in range(num_layers)
            for group in groups
        }
        self._tensors: list[Tensor] = []
        """What the tables point into."""
        self._num_slots = 0
        self._most_ranks = 1
        self._segments = Table(np.zeros((0, 3), dtype=np.int64))
        self._workspace = torch.empty(0, 1)

    @property
    def num_bytes(self) -> int:
        """The packed matrices."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def load(self, weights: AdapterWeights) -> int:
        """Pack an adapter for the compiled operations; nothing else of it is kept."""
        for (layer, name), table in self._tables.items():
            group = weights.layers[layer].get(name)
            row = np.zeros((1, ADAPTER_FIELDS), dtype=np.int64)
            if group is not None:
                fields = self._pack(group, self._groups[name])
                row[0, : len(fields)] = fields
                self._most_ranks = max(self._most_ranks, sum(group.ranks))
            self._tables[layer, name] = Table(np.concatenate([table.values, row]))
        self._num_slots += 1
        return self._num_slots - 1

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        segments = arrangement.segments
        rows_of = [(segment.slot, segment.start, segment.length) for segment in segments]
        self._segments = Table(np.array(rows_of, dtype=np.int64))
        rows = segments[-1].end
        if self._workspace.shape[0] < rows or self._workspace.shape[1] < self._most_ranks:
            self._workspace = torch.empty(rows, self._most_ranks)

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        self._ops.lora(x, out, self._tables[layer, group], self._segments, self._workspace)

    def _pack(self, weights: GroupWeights, shape: GroupShape) -> Sequence[int]:
        """The table's fields of an adapter in one fused linear."""
        units = self._ops.units
        a = pack_a(weights.a.to(self._ops.dtype), units)
        self._tensors.append(a)
        fields = [a.data_ptr(), a.shape[0], len(shape.modules)]
        for rank, b, offset, size in zip(
            weights.ranks, weights.b, shape.out_offsets, shape.out_features, strict=True
        ):
            pointer = 0
            if b is not None:
                packed = pack_b(b.to(self._ops.dtype), units)
                self._tensors.append(packed)
                pointer = packed.data_ptr()
            fields += [rank, pointer, offset, size]
        return fields
