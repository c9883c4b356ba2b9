"""Attention of long chunks by torch's products, where they are faster than the compiled operation.

The compiled one computes with the vectors of a processor. torch's libraries also know its matrix units (AMX),
and AVX2 better than we do; but they want the context in one piece, which pays from some number of rows on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import torch
from torch import Tensor

from inference_service.engine.kernels.attention import attend_chunk
from inference_service.engine.kernels.cpu.ops import BLOCK, Chunks, CpuOps, Planned
from loramux_shared.bases.rope import HeadCounts

SIZES: Final = (128, 32, 8)
"""Rows of chunks that are tried, in a context of `CONTEXT` tokens."""
CONTEXT: Final = 1024
GAIN: Final = 0.8
"""Share of the compiled operation's time below which torch's must stay.

A smaller gain is not worth other bits.
"""
ROUNDS: Final = 3


@dataclass(frozen=True)
class LongChunk:
    """A chunk that attends to everything before it."""

    rows: slice
    blocks: Tensor
    """[n], of BLOCK positions."""
    seen: int
    """Positions, its own included."""
    mask: Tensor | None
    """[length, seen]: 0, and -inf where a row may not look; None where a chunk sees nothing before itself."""

    @classmethod
    def make(cls, planned: Planned, dtype: torch.dtype) -> LongChunk:
        """Plan (first row, rows, context length, cache blocks of BLOCK positions)."""
        row, length, end, blocks = planned
        used = torch.tensor(blocks[: -(-end // BLOCK)], dtype=torch.int64)
        mask = None
        if end > length:
            mask = torch.full((length, end), float("-inf"), dtype=dtype).triu_(end - length + 1)
        return cls(slice(row, row + length), used, end, mask)

    def attend(self, ops: CpuOps, q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Write what q [T, heads, d] attends to in the cache of `CpuOps.new_cache` to the rows of out."""
        own = ops.in_order(keys[:, self.blocks], values[:, self.blocks], q.shape[2])
        own_keys, own_values = (part[:, : self.seen] for part in own)
        out[self.rows] = attend_chunk(q[self.rows], own_keys, own_values, self.mask, scale).flatten(1)


def rows_from_which_torch_is_faster(ops: CpuOps, heads: Sequence[HeadCounts]) -> int | None:
    """Measure on this machine, with the heads of all layers; None where it is not.

    On one thread and by its own time, which other work does not lengthen: some hundredths of a second, or
    tenths where heads are many.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        faster = [*takewhile(lambda rows: all(_is_faster(ops, each, rows) for each in heads), SIZES)]
    finally:
        torch.set_num_threads(threads)
    return faster[-1] if faster else None


def _is_faster(ops: CpuOps, heads: HeadCounts, rows: int) -> bool:
    q = torch.randn(rows, heads.queries, heads.dim).to(ops.dtype)
    keys, values = (cache.normal_() for cache in ops.new_cache(heads.kv, CONTEXT, heads.dim))
    planned = (0, rows, CONTEXT, range(CONTEXT // BLOCK))
    chunks, chunk, out = Chunks.make([planned]), LongChunk.make(planned, ops.dtype), q.flatten(1)
    compiled = _least_s(lambda: ops.attention(q, chunks, keys, values, heads.group, 1.0, 0.0, 0))
    return _least_s(lambda: chunk.attend(ops, q, keys, values, 1.0, out)) < GAIN * compiled


def _least_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def split(
    planned: Sequence[Planned], rows: int | None, dtype: torch.dtype
) -> tuple[list[Planned], list[LongChunk]]:
    """Return the contexts for the compiled operation, and those of at least so many rows for torch's."""
    short: list[Planned] = []
    long: list[LongChunk] = []
    for each in planned:
        if rows is None or each[1] < rows:
            short.append(each)
        else:
            long.append(LongChunk.make(each, dtype))
    return short, long
