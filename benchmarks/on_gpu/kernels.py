"""Kernels alone, against the bytes that they must move and against torch's own.

SGMV of one linear stands beside the base's product, attention beside torch's without pages, and the gated
delta rule, of Qwen 3.5 9B's sizes, alone. Points go along each axis through a middle one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.on_gpu.device import Device, Work
from benchmarks.on_gpu.run import FLOOR, OF_FLOOR, Run
from inference_service.kernels import delta
from inference_service.kernels.attention import plan as attention_plan
from inference_service.kernels.launch import Launch
from inference_service.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    Group,
    SegmentCapacity,
    Segments,
    Slices,
    pack_segments,
    pack_table,
    plan,
    workspace_numel,
)
from tests.kernels import attention_case, delta_case

LONG: Final = 1024
"""Rows from which on a batch is taken for prompts."""
ACTIVE: Final = 64
"""Adapters that a step may have: the default."""
SHORT: Final = 20
"""Tokens of context of the sequences beside."""
WIDTH: Final = 4
"""Rows of a convolution before the delta rule."""


@dataclass(frozen=True)
class Point:
    """A linear from hidden to hidden; rows are dealt out evenly to adapters of one rank."""

    hidden: int
    rank: int
    batch: int
    adapters: int
    """Adapters of the batch."""
    loaded: int = 0
    """Adapters that there are, the batch's among them; 0: only those."""

    @property
    def tile(self) -> int:
        """Entries of a segment."""
        return PREFILL_TILE if self.batch >= LONG else DECODE_TILE


LINEARS: Final = (
    *(Point(hidden, 16, 32, 8) for hidden in (2048, 4096, 8192)),
    *(Point(4096, rank, 32, 8) for rank in (8, 64)),
    *(Point(4096, 16, batch, min(8, batch)) for batch in (1, 8, 64, 128, 256)),
    *(Point(4096, 16, 64, adapters) for adapters in (1, 2, 16, 32, 64)),
    *(Point(hidden, rank, batch, 64) for hidden in (2048, 8192) for rank in (8, 64) for batch in (64, 256)),
    *(Point(4096, 16, 2048, adapters) for adapters in (1, 8)),
    *(Point(4096, 16, batch, 8, loaded) for batch in (64, 2048) for loaded in (64, 1000)),
)
TINY_LINEARS: Final = (Point(64, 8, 3, 2), Point(64, 8, LONG, 2), Point(64, 8, 3, 2, 20))


@dataclass(frozen=True)
class Linear:
    """Random adapters and rows of a point, in memory of their own."""

    x: Tensor
    out: Tensor
    group: Group
    segments: Segments
    workspace: Tensor
    num_bytes: int
    """The least bytes to move: weights and rows read, the output read and written."""

    @classmethod
    def make(cls, device: Device, point: Point) -> Linear:
        """Draw them."""
        where, dtype, hidden = device.where, device.dtype, point.hidden
        slices, loaded = Slices.consecutive(hidden), point.loaded or point.adapters
        table = torch.from_numpy(pack_table([(point.rank,)] * loaded, slices, hidden)).to(where)
        shape = loaded, 2, point.rank * hidden  # A and B, of as many elements
        scales = torch.tensor([[hidden**-0.5], [point.rank**-0.5]], dtype=dtype, device=where)
        weights = (torch.randn(shape, dtype=dtype, device=where) * scales).view(-1)
        group = Group(weights, table, slices, hidden, max_rank=point.rank, max_rows=point.rank)
        capacity = SegmentCapacity(point.batch, loaded, point.tile, active=max(ACTIVE, point.adapters))
        segments = Segments.allocate(capacity, where)
        slots = np.arange(point.batch) * point.adapters // point.batch * (loaded // point.adapters)
        segments.load(torch.from_numpy(pack_segments(capacity, slots)))
        x, out = (torch.randn(point.batch, hidden, dtype=dtype, device=where) for _ in range(2))
        workspace = torch.empty(workspace_numel(group, segments), device=where)
        num_bytes = weights.nbytes * point.adapters // loaded + x.nbytes + 2 * out.nbytes
        return cls(x, out, group, segments, workspace, num_bytes)

    def plan(self) -> list[Launch]:
        """Return our launches."""
        return plan(self.x, self.out, self.group, self.segments, self.workspace)


def sgmv(run: Run) -> None:
    """Time SGMV."""

    def measure(point: Point) -> None:
        device = run.device
        linear = Linear.make(device, point)
        more = [Linear.make(device, point) for _ in range(device.copies_of(linear.num_bytes) - 1)]
        ours = device.replayed_us([all_of(each.plan()) for each in (linear, *more)])
        shape = point.hidden, point.hidden
        weights = [torch.randn(shape, dtype=device.dtype, device=device.where) for _ in (linear, *more)]
        dense = device.replayed_us([partial(torch.mm, linear.x, weight) for weight in weights])
        floor = device.floor_us(linear.num_bytes)
        run.add(asdict(point), {FLOOR: floor, "us": ours, OF_FLOOR: ours / floor, "dense us": dense})

    run.each(run.choose(LINEARS, TINY_LINEARS), measure)


@dataclass(frozen=True)
class Attended:
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

    def plan(self, device: Device) -> list[Launch]:
        """Return our launches for one layer: rotation, writing the cache, attending, merging."""
        layout = attention_case.Layout(self.chunks, decode_only=self.rows == 1)
        heads = attention_case.Heads(self.heads, self.kv_heads, self.dim)
        made = attention_case.make_case(layout, heads, dtype=device.dtype, device=str(device.where))
        return attention_plan(made.inputs, made.tables, made.spec)[1]

    def peer(self, device: Device) -> Callable[[], Tensor]:
        """Return torch's attention over contiguous keys and values: of prompts, or of decodes of one length."""
        draw = partial(torch.randn, dtype=device.dtype, device=device.where)
        q = draw(self.batch, self.heads, self.rows, self.dim)
        k, v = (draw(self.batch, self.kv_heads, self.context, self.dim) for _ in range(2))
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=self.rows > 1, enable_gqa=True)


ATTENDED: Final = (
    *(Attended(batch, 1, context) for batch in (1, 8, 32, 128) for context in (512, 4096)),
    Attended(1, 1, 32768),
    *(Attended(1, rows, rows) for rows in (512, 2048)),
    Attended(4, 256, 4096),
    Attended(1, 1, 4000, beside=31),
    Attended(1, 1, 32000, beside=255),
    Attended(1, 33, 4033),
    Attended(1, 33, 32033),
    Attended(1, 33, 4033, beside=31),
)
TINY_ATTENDED: Final = (Attended(2, 1, 20, 2, 1, 16), Attended(1, 4, 20, 2, 1, 16, beside=2))


def attend(run: Run) -> None:
    """Time attention."""

    def measure(point: Attended) -> None:
        device, decodes = run.device, point.rows == 1
        row_bytes = 2 * point.dim * device.item_bytes
        cached = row_bytes * point.kv_heads * sum(context for _, context in point.chunks)
        rows = row_bytes * (point.heads + point.kv_heads) * sum(rows for rows, _ in point.chunks)
        plans = [point.plan(device) for _ in range(device.copies_of(cached))]
        ours, theirs = device.replayed_us([all_of(launches) for launches in plans]), None
        # A tape refuses what may draw random numbers, as dropout would.
        if not (point.beside or 1 < point.rows < point.context or device.rehearses):
            theirs = device.replayed_us([point.peer(device) for _ in plans])
        floor = device.floor_us(cached + rows) if decodes else None
        pairs = point.batch * point.rows * (point.context - (point.rows - 1) / 2)
        run.add(
            asdict(point),
            {
                FLOOR: floor,
                "us": ours,
                OF_FLOOR: None if floor is None else ours / floor,
                "TFLOP/s": None if decodes else 4 * point.heads * point.dim * pairs / ours / 1e6,
                "sdpa us": theirs,
            },
        )

    run.each(run.choose(ATTENDED, TINY_ATTENDED), measure)


@dataclass(frozen=True)
class States:
    """Sequences that continue; each computes so many rows."""

    batch: int
    rows: int
    """1: decode."""
    key_heads: int = 16
    heads: int = 32
    dim: int = 128

    def work(self, device: Device) -> Work:
        """Return what computes one layer."""
        sizes = self.key_heads, self.heads, self.dim, self.dim
        total, where = self.batch * self.rows, str(device.where)
        weights, states = delta_case.layer(sizes, WIDTH, device.dtype, where, self.batch)
        inputs = delta_case.inputs_of(total, sizes, weights, states)
        tile = None if self.rows == 1 else delta.delta_tile(device.dtype)
        capacity = delta.DeltaCapacity(total, self.batch, tile)
        tables = delta.DeltaTables.allocate(capacity, device.where)
        rows = self.rows
        chunks = [delta.StateChunk(index * rows, rows, index, fresh=False) for index in range(self.batch)]
        tables.load(torch.from_numpy(delta.pack_delta(capacity, chunks)))
        return partial(delta.gated_delta, inputs, tables)


STATES: Final = (
    *(States(batch, 1) for batch in (1, 8, 32, 128)),
    States(1, 512),
    States(1, 2048),
    States(4, 256),
)
TINY_STATES: Final = (States(2, 1, 1, 2, 16), States(1, 20, 1, 2, 16))


def states(run: Run) -> None:
    """Time the gated delta rule."""

    def measure(point: States) -> None:
        device = run.device
        columns = 2 * point.key_heads * point.dim + 3 * point.heads * point.dim
        moved = 2 * 4 * point.batch * point.heads * point.dim * point.dim
        moved += device.item_bytes * point.batch * point.rows * columns
        ours = device.replayed_us([point.work(device) for _ in range(device.copies_of(moved))])
        floor = device.floor_us(moved) if point.rows == 1 else None
        of_floor = None if floor is None else ours / floor
        run.add(asdict(point), {FLOOR: floor, "us": ours, OF_FLOOR: of_floor})

    run.each(run.choose(STATES, TINY_STATES), measure)


def all_of(launches: Sequence[Launch]) -> Work:
    """Return what launches all of them."""

    def launch() -> None:
        for each in launches:
            each()

    return launch
