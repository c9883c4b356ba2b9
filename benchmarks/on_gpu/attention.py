"""Paged attention against the bytes of its keys and values, and against torch's own kernel without pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.targets import FLOOR, OF_FLOOR
from benchmarks.on_gpu.timing import copies_of, replayed
from inference_service.kernels.attention import (
    AttentionCapacity,
    AttentionTables,
    Context,
    Inputs,
    pack_tables,
    plan,
    prefill_tile,
)
from inference_service.kernels.launch import Launch
from loramux_shared.bases.attention import AttentionSpec

BLOCK_SIZE: Final = 16


@dataclass(frozen=True)
class Point:
    """Sequences of one length; each computes so many of its last rows."""

    batch: int
    rows: int
    """1: decode."""
    context: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128


FULL: Final = (
    *(Point(batch, 1, context) for batch in (1, 8, 32, 128) for context in (512, 4096)),
    Point(1, 1, 32768),
    *(Point(1, rows, rows) for rows in (512, 2048)),
    Point(4, 256, 4096),
)
QUICK: Final = (Point(1, 1, 4096), Point(32, 1, 4096), Point(1, 2048, 2048))
REHEARSAL: Final = (Point(2, 1, 20, 2, 1, 16), Point(1, 4, 4, 2, 1, 16), Point(1, 4, 20, 2, 1, 16))


@dataclass(frozen=True)
class Layer:
    """The tensors of one step in one layer."""

    inputs: Inputs
    tables: AttentionTables

    @classmethod
    def make(cls, device: Device, point: Point) -> Layer:
        """Draw them; blocks are scattered over the cache."""
        where, total = device.where, point.batch * point.rows
        blocks = -(-point.context // BLOCK_SIZE)
        tile = prefill_tile(where, device.dtype, point.dim, point.heads // point.kv_heads)
        capacity = AttentionCapacity(
            total, point.batch, blocks, BLOCK_SIZE, tile=None if point.rows == 1 else tile
        )
        order = torch.randperm(point.batch * blocks).view(point.batch, blocks).tolist()
        contexts = [Context(i * point.rows, point.rows, order[i], point.context) for i in range(point.batch)]
        tables = AttentionTables.allocate(capacity, where)
        tables.load(torch.from_numpy(pack_tables(capacity, contexts)))
        draw = partial(torch.randn, dtype=device.dtype, device=where)
        cache = draw(2, point.kv_heads, point.batch * blocks * BLOCK_SIZE, point.dim)
        heads = draw(total, point.heads + 2 * point.kv_heads, point.dim)
        turns = torch.ones(2, total, point.dim, dtype=device.dtype, device=where)
        return cls(Inputs(heads, turns[0], turns[1], cache[0], cache[1]), tables)

    def plan(self) -> list[Launch]:
        """Our launches: rotation, writing the cache, attending, merging."""
        return plan(self.inputs, self.tables, AttentionSpec(self.inputs.head_dim**-0.5))[1]


def run(run: Run) -> None:
    """Time every point."""
    run.each(run.choose(FULL, QUICK, REHEARSAL), lambda point: _measure(run, point))


def _measure(run: Run, point: Point) -> None:
    device = run.device
    size = torch.finfo(device.dtype).bits // 8
    cached = 2 * point.batch * point.kv_heads * point.context * point.dim * size
    rows = point.batch * point.rows * point.dim * size * (2 * point.heads + 2 * point.kv_heads)
    plans = [Layer.make(device, point).plan() for _ in range(copies_of(device, cached))]
    ours = replayed(device, [partial(_launch, launches) for launches in plans]).median_us
    peers = [_peer(device, point) for _ in plans if not 1 < point.rows < point.context]
    theirs = _time_peers(device, peers) if peers else None
    floor = run.machine.floor_us(cached + rows) if point.rows == 1 else None
    products = 4 * point.batch * point.heads * point.dim * point.rows * (point.context - (point.rows - 1) / 2)
    run.add(
        asdict(point),
        {
            FLOOR: floor,
            "ours us": ours,
            OF_FLOOR: None if floor is None else ours / floor,
            "launches": len(plans[0]),
            "TFLOP/s": None if point.rows == 1 else products / ours / 1e6,
            "sdpa us": theirs,
            "of sdpa": None if theirs is None else ours / theirs,
        },
    )


def _peer(device: Device, point: Point) -> Callable[[], Tensor]:
    """torch's attention over contiguous keys and values; it has none for chunks that continue a context."""
    draw = partial(torch.randn, dtype=device.dtype, device=device.where)
    q = draw(point.batch, point.heads, point.rows, point.dim)
    k, v = (draw(point.batch, point.kv_heads, point.context, point.dim) for _ in range(2))
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=point.rows > 1, enable_gqa=True)


def _time_peers(device: Device, peers: list[Callable[[], Tensor]]) -> float:
    if not device.rehearses:
        return replayed(device, peers).median_us
    peers[0]()  # a tape refuses what may draw random numbers, as dropout would
    return math.nan


def _launch(launches: list[Launch]) -> None:
    for launch in launches:
        launch()
