"""From the heads of a fused qkv to what they attend to: rotate, write the cache, attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from inference_service.kernels.attention import (
    AttentionTables,
    Context,
    Inputs,
    PagedAttention,
    attend,
)
from inference_service.kernels.cpu.ops import BLOCK, Chunks, CpuOps
from inference_service.layers.norm import RMSNorm
from inference_service.layers.rope import rotate
from loramux_shared.bases.attention import AttentionSpec

Turn = tuple[Tensor, Tensor]
"""cos and sin of the step's rows, in the form that an `Attention` made them."""


class Attention(Protocol):
    """The attention of one step, shared by all layers."""

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """Prepare cos and sin [T, 1, rotary] of `Rope.at`, once per step."""
        ...

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Return [T, heads * d] of the heads of queries, keys and values, side by side [T, all heads, d].

        Queries and keys are normed first, where the layer has a norm for them.
        """
        ...


class TorchAttention:
    """In plain torch."""

    def __init__(self, plan: PagedAttention, num_heads: int, num_kv_heads: int) -> None:
        self._plan = plan
        self._num_heads = num_heads
        self._rotated = num_heads + num_kv_heads

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """As they are."""
        return cos, sin

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Rotate queries and keys together, then gather and attend."""
        heads = _normed(heads, self._rotated, norm)
        qk = rotate(heads[:, : self._rotated], *turn)
        q, k = qk[:, : self._num_heads], qk[:, self._num_heads :]
        out = self._plan(q, k, heads[:, self._rotated :], keys, values, spec)
        return out.reshape(len(heads), -1)


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
            small = (
                blocks if parts == 1 else [block * parts + part for block in blocks for part in range(parts)]
            )
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


class TritonAttention:
    """With the kernels for GPUs: norm, rotation and write in one launch, then one to three that attend."""

    def __init__(self, tables: AttentionTables) -> None:
        """Take the tables, which hold the step by the time that the launches run."""
        self._tables = tables

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """[T, rotary]."""
        return cos.squeeze(1), sin.squeeze(1)

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Rows that belong to no chunk are 0."""
        inputs = Inputs(heads, *turn, keys, values)
        return attend(inputs, self._tables, spec, None if norm is None else norm.of_heads).flatten(1)


def _normed(heads: Tensor, rotated: int, norm: RMSNorm | None) -> Tensor:
    """Norm the heads of queries and keys [T, all heads, d], not those of values."""
    return heads if norm is None else torch.cat([norm(heads[:, :rotated]), heads[:, rotated:]], dim=1)
