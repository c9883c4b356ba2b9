"""Attention with the compiled operations, on a CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inference_service.core.sequence import GONE
from inference_service.engine.backends.base import LayerHeads, Rotation
from inference_service.engine.backends.long_chunks import LongChunk, split
from inference_service.engine.backends.operations import parts
from inference_service.engine.kernels.attention import Context
from inference_service.engine.kernels.cpu.ops import BLOCK, Chunks, CpuOps, Planned, Table


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
        cls, contexts: Sequence[Context], group: int, block_size: int, dtype: torch.dtype, long_rows: int | None
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

    def copied(self) -> _Plan:
        """Return the same plan in arrays of its own; it has no long chunks."""
        chunks = Chunks(Table(self.chunks.table.values.copy()), self.chunks.blocks)
        return _Plan(self.cache_rows.clone(), chunks, chunks, [])

    def take(self, other: _Plan) -> None:
        """Copy a plan of as many rows and chunks, whose blocks must outlast the step."""
        self.cache_rows.copy_(other.cache_rows)
        self.chunks.table.values[:] = other.chunks.table.values


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

    @property
    def num_chunks(self) -> int | None:
        """Chunks of the step; None where one of them attends by torch's products."""
        plan = next(iter(self._plans.values()))
        return None if plan.long else len(plan.chunks.table.values)

    def copied(self) -> NativeAttention:
        """Return the same plan in arrays of its own."""
        made = copy(self)
        made._plans = {window: plan.copied() for window, plan in self._plans.items()}
        return made

    def take(self, other: NativeAttention) -> None:
        """Take the plan of a step with as many rows and chunks, in the arrays that there are."""
        for window, plan in self._plans.items():
            plan.take(other._plans[window])

    def prepare_rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        """float32 [T, rotary]."""
        return cos.squeeze(1).float().contiguous(), sin.squeeze(1).float().contiguous()

    def __call__(self, layer: LayerHeads) -> Tensor:
        """Rotate in place, write the cache, attend over it where it lies."""
        # A cache of the model's type has no scales, and `apply_deferring_lora` makes no update.
        heads, rotation, keys, values, spec, norm, sinks, *_ = layer
        queries, rotated = parts(heads, len(keys), spec)
        if norm is not None:
            self._ops.norm_heads(heads, norm.weight, norm.eps, norm.offset)
        q, k, v = heads[:, :queries], heads[:, queries:rotated], heads[:, rotated:]
        plan = self._plans[spec.window]
        self._ops.rope_write(q, k, v, *rotation, plan.cache_rows, keys, values)
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
            (spec.window or 0) * (-1 if spec.tumbling else 1),
            sinks,
        )
        for chunk in long:
            chunk.attend(self._ops, q, keys, values, spec.scale, out)
        return out
