"""SGMV of one linear against the bytes that it must move, beside the base's own product.

Points go along each axis through a middle one, and to corners.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.on_gpu.device import Device, Work
from benchmarks.on_gpu.run import FLOOR, OF_FLOOR, Run
from inference_service.engine.kernels.launch import Launch
from inference_service.engine.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    Group,
    SegmentCapacity,
    Segments,
    Slices,
    expand,
    pack_segments,
    pack_table,
    shrink,
    workspace_numel,
)

LONG: Final = 1024
"""Rows from which on a batch is taken for prompts."""
ACTIVE: Final = 64
"""Adapters that a step may have: the default."""


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
    def make(cls, device: Device, point: Point) -> Self:
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
        step = self.group, self.segments, self.workspace
        return [shrink(self.x, *step), *expand(self.out, *step)]


def run(run: Run) -> None:
    """Time every point."""

    def measure(point: Point) -> None:
        device = run.device
        linear = Linear.make(device, point)
        every = [linear, *(Linear.make(device, point) for _ in range(device.copies_of(linear.num_bytes) - 1))]
        ours = device.replayed_us([all_of(each.plan()) for each in every])
        weights = torch.randn(len(every), *2 * (point.hidden,), dtype=device.dtype, device=device.where)
        dense = device.replayed_us([partial(torch.mm, linear.x, weight) for weight in weights])
        floor = device.floor_us(linear.num_bytes)
        run.add(asdict(point), {FLOOR: floor, "us": ours, OF_FLOOR: ours / floor, "dense us": dense})

    run.each(run.choose(LINEARS, TINY_LINEARS), measure)


def all_of(launches: Sequence[Launch]) -> Work:
    """Return what launches all of them."""

    def launch() -> None:
        for each in launches:
            each()

    return launch
