"""The gated delta rule against the bytes of its states: one layer of Qwen 3.5 9B's sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import torch

from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.targets import FLOOR, OF_FLOOR
from benchmarks.on_gpu.timing import copies_of, replayed
from inference_service.kernels.delta import (
    DeltaCapacity,
    DeltaTables,
    StateChunk,
    delta_tile,
    gated_delta,
    pack_delta,
)
from tests.kernels import delta_case

WIDTH: Final = 4


@dataclass(frozen=True)
class Point:
    """Sequences that continue; each computes so many rows."""

    batch: int
    rows: int
    """1: decode."""
    key_heads: int = 16
    heads: int = 32
    dim: int = 128

    @property
    def sizes(self) -> delta_case.Sizes:
        """The sizes of the layer."""
        return self.key_heads, self.heads, self.dim, self.dim


FULL: Final = (*(Point(batch, 1) for batch in (1, 8, 32, 128)), Point(1, 512), Point(1, 2048), Point(4, 256))
QUICK: Final = (Point(1, 1), Point(32, 1), Point(1, 2048))
REHEARSAL: Final = (Point(2, 1, 1, 2, 16), Point(1, 20, 1, 2, 16))


def run(run: Run) -> None:
    """Time every point."""
    run.each(run.choose(FULL, QUICK, REHEARSAL), lambda point: _measure(run, point))


def _measure(run: Run, point: Point) -> None:
    states = 2 * 4 * point.batch * point.heads * point.dim * point.dim
    size = torch.finfo(run.device.dtype).bits // 8
    columns = 2 * point.key_heads * point.dim + 3 * point.heads * point.dim
    moved = states + size * point.batch * point.rows * columns
    works = [_work(run.device, point) for _ in range(copies_of(run.device, moved))]
    ours = replayed(run.device, works).median_us
    floor = run.machine.floor_us(moved) if point.rows == 1 else None
    run.add(
        asdict(point),
        {FLOOR: floor, "ours us": ours, OF_FLOOR: None if floor is None else ours / floor},
    )


def _work(device: Device, point: Point) -> partial[torch.Tensor]:
    total, where = point.batch * point.rows, str(device.where)
    weights, states = delta_case.layer(point.sizes, WIDTH, device.dtype, where, point.batch)
    inputs = delta_case.inputs_of(total, point.sizes, weights, states)
    tile = None if point.rows == 1 else delta_tile(device.dtype)
    capacity = DeltaCapacity(total, point.batch, tile)
    tables = DeltaTables.allocate(capacity, device.where)
    chunks = [StateChunk(index * point.rows, point.rows, index, fresh=False) for index in range(point.batch)]
    tables.load(torch.from_numpy(pack_delta(capacity, chunks)))
    return partial(gated_delta, inputs, tables)
