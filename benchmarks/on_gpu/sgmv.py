"""SGMV of one linear against the bytes it must move, a loop of `torch.mm`, and the base's own product.

The whole grid of widths, ranks, batches and adapters would be 500 points. These go along each axis through a
middle point, and to the corners that differ most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.targets import FLOOR, OF_FLOOR
from benchmarks.on_gpu.timing import copies_of, eager, replayed
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

LONG: Final = 1024
"""Rows from which on a batch is taken for prompts."""


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


ACTIVE: Final = 16
"""Adapters that a step may have, as is usual."""
MIDDLE: Final = Point(4096, 16, 32, 8)
FULL: Final = (
    *(Point(hidden, 16, 32, 8) for hidden in (2048, 4096, 8192)),
    *(Point(4096, rank, 32, 8) for rank in (8, 64)),
    *(Point(4096, 16, batch, min(8, batch)) for batch in (1, 8, 64, 128, 256)),
    *(Point(4096, 16, 64, adapters) for adapters in (1, 2, 16, 32, 64)),
    *(Point(hidden, rank, batch, 64) for hidden in (2048, 8192) for rank in (8, 64) for batch in (64, 256)),
    *(Point(hidden, rank, 1, 1) for hidden in (2048, 8192) for rank in (8, 64)),
    *(Point(4096, 16, 2048, adapters) for adapters in (1, 8)),
    *(Point(4096, 16, batch, 8, loaded) for batch in (64, 2048) for loaded in (64, 1000)),
)
QUICK: Final = (Point(4096, 16, 1, 1), MIDDLE, Point(8192, 64, 64, 64), Point(4096, 16, 64, 8, 1000))
REHEARSAL: Final = (Point(64, 8, 3, 2), Point(64, 8, LONG, 2), Point(64, 8, 3, 2, 20))


@dataclass(frozen=True)
class Linear:
    """Random adapters and rows of a point, in memory of their own."""

    x: Tensor
    out: Tensor
    group: Group
    segments: Segments
    workspace: Tensor
    slots: tuple[int, ...]
    """Slot of each row, in order."""

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
        return cls(x, out, group, segments, workspace, tuple(slots.tolist()))

    @property
    def num_bytes(self) -> int:
        """Return the least bytes to move: weights and rows read, the output read and written."""
        read = len(set(self.slots)) / len(self.group.table)
        weights = int(self.group.weights.nbytes * read)
        return weights + self.x.nbytes + 2 * self.out.nbytes

    def plan(self) -> list[Launch]:
        """Our launches."""
        return plan(self.x, self.out, self.group, self.segments, self.workspace)

    def loop(self) -> None:
        """The peer: two products per adapter, on its own rows."""
        rank, hidden = self.group.max_rank, self.x.shape[1]
        weights = self.group.weights.view(-1, 2, rank, hidden)
        for slot in dict.fromkeys(self.slots):
            first, last = self.slots.index(slot), len(self.slots) - self.slots[::-1].index(slot)
            a, b = weights[slot]
            self.out[first:last].addmm_(torch.mm(self.x[first:last], a.t()), b)


def run(run: Run) -> None:
    """Time every point."""
    run.each(run.choose(FULL, QUICK, REHEARSAL), lambda point: _measure(run, point))


def _measure(run: Run, point: Point) -> None:
    device = run.device
    linear = Linear.make(device, point)
    others = [Linear.make(device, point) for _ in range(copies_of(device, linear.num_bytes) - 1)]
    linears = [linear, *others]
    plans = [linear.plan() for linear in linears]
    ours = replayed(device, [partial(_launch, launches) for launches in plans]).median_us
    loop = replayed(device, [each.loop for each in linears]).median_us
    shape = point.hidden, point.hidden
    weights = [torch.randn(shape, dtype=device.dtype, device=device.where) for _ in linears]
    dense = replayed(device, [partial(torch.mm, linear.x, weight) for weight in weights]).median_us
    called = eager(device, lambda: _launch(linear.plan())).median_us
    floor = run.machine.floor_us(linear.num_bytes)
    run.add(
        asdict(point),
        {
            FLOOR: floor,
            "us": ours,
            OF_FLOOR: ours / floor,
            "eager us": called,
            "mm loop us": loop,
            "of loop": ours / loop,
            "dense us": dense,
        },
    )


def _launch(launches: list[Launch]) -> None:
    for launch in launches:
        launch()
