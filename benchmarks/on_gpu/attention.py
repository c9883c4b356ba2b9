"""Paged attention against the bytes of its keys and values, and against torch's own kernel without pages.

Beside the times stand the programs that attend, those of them that have keys, and the most keys that one has:
these are counted, and so are reported in a rehearsal too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import numpy as np
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
from loramux_shared.bases.rope import AttentionSpec

BLOCK_SIZE: Final = 16
SHORT: Final = 20
"""Tokens of context of the sequences beside."""


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
    beside: int = 0
    """More sequences, which decode at SHORT tokens."""

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Return rows and context of every sequence."""
        return [(self.rows, self.context)] * self.batch + [(1, SHORT)] * self.beside


SKEWED: Final = Point(1, 1, 4000, beside=31)
PREFIX: Final = Point(1, 33, 4033)
"""A short suffix of a long prefix that is cached."""
FULL: Final = (
    *(Point(batch, 1, context) for batch in (1, 8, 32, 128) for context in (512, 4096)),
    Point(1, 1, 32768),
    *(Point(1, rows, rows) for rows in (512, 2048)),
    Point(4, 256, 4096),
    SKEWED,
    Point(1, 1, 32000, beside=255),
    PREFIX,
    Point(1, 33, 32033),
    Point(1, 33, 4033, beside=31),
)
QUICK: Final = (Point(1, 1, 4096), Point(32, 1, 4096), Point(1, 2048, 2048), SKEWED, PREFIX)
REHEARSAL: Final = (
    *(Point(batch, rows, context, 2, 1, 16) for batch, rows, context in ((2, 1, 20), (1, 4, 4), (1, 4, 20))),
    Point(1, 1, 300, 2, 1, 16, beside=2),
)


@dataclass(frozen=True)
class Layer:
    """The tensors of one step in one layer."""

    inputs: Inputs
    tables: AttentionTables

    @classmethod
    def make(cls, device: Device, point: Point) -> Layer:
        """Draw them; blocks are scattered over the cache."""
        where, kv = device.where, point.kv_heads
        total = sum(rows for rows, _ in point.chunks)
        needed = [-(-context // BLOCK_SIZE) for _, context in point.chunks]
        tile = prefill_tile(where, device.dtype, point.dim, point.heads // kv)
        capacity = AttentionCapacity(
            total, len(needed), max(needed), BLOCK_SIZE, tile=None if point.rows == 1 else tile, kv_heads=kv
        )
        order, contexts, row = iter(torch.randperm(sum(needed)).tolist()), list[Context](), 0
        for (rows, context), blocks in zip(point.chunks, needed, strict=True):
            contexts.append(Context(row, rows, [next(order) for _ in range(blocks)], context))
            row += rows
        tables = AttentionTables.allocate(capacity, where)
        tables.load(torch.from_numpy(pack_tables(capacity, contexts)))
        draw = partial(torch.randn, dtype=device.dtype, device=where)
        cache = draw(2, kv, sum(needed) * BLOCK_SIZE, point.dim)
        heads = draw(total, point.heads + 2 * kv, point.dim)
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
    cached = 2 * point.kv_heads * sum(context for _, context in point.chunks) * point.dim * size
    rows = sum(rows for rows, _ in point.chunks) * point.dim * size * (2 * point.heads + 2 * point.kv_heads)
    plans = [Layer.make(device, point).plan() for _ in range(copies_of(device, cached))]
    ours = replayed(device, [partial(_launch, launches) for launches in plans]).median_us
    peers = [_peer(device, point) for _ in plans if not (point.beside or 1 < point.rows < point.context)]
    attends = [launch for launch in plans[0] if "p_items" in launch.arguments]
    keys = [keys for launch in attends for keys in _keys(launch)]
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
            "programs": sum(math.prod(launch.grid) for launch in attends),
            "with keys": sum(count > 0 for count in keys) * point.kv_heads,
            "most keys": max(keys),
            "TFLOP/s": None if point.rows == 1 else products / ours / 1e6,
            "sdpa us": theirs,
            "of sdpa": None if theirs is None else ours / theirs,
        },
    )


def _keys(launch: Launch) -> list[int]:
    """The keys of every item, as the kernel finds them."""
    items = launch.arguments["p_items"].cpu().numpy().T
    _, rows, at, _, piece, pieces, *_ = items[:, items[1] > 0].astype(int)
    seen, step = at + rows, launch.arguments["BLOCK_N"]
    steps = -(-seen // (pieces * step))
    span = np.maximum(steps * step, launch.arguments["MIN_SPAN"])
    span = np.where(pieces > 1, span, seen)
    return [int(keys) for keys in np.clip(seen - piece * span, 0, span)]


def _peer(device: Device, point: Point) -> Callable[[], Tensor]:
    """torch's attention over contiguous keys and values: of whole prompts, or of decodes of one length."""
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
