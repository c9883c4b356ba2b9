"""Other tiles than those of the tables of SGMV and of experts: which win, bucket by bucket.

A launch is a value, so a candidate is the shipped launch with other tiles in it. Candidates that do not fit the
device are left out, and so are those whose result differs from the shipped one's. The best one's line is as it
stands in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.sgmv import Linear, Point
from benchmarks.on_gpu.timing import copies_of, replayed
from inference_service.kernels.experts import by_expert, grouped
from inference_service.kernels.experts.tuning import GroupedConfig
from inference_service.kernels.launch import Launch, intercepted
from inference_service.kernels.sgmv.tuning import DECODE_TILE, ExpandConfig, ShrinkConfig

FULL: Final = (
    Point(4096, 16, 1, 1),
    Point(4096, 16, 32, 8),
    Point(4096, 16, 64, 64),
    Point(4096, 64, 64, 16),
    Point(8192, 64, 64, 64),
)
QUICK: Final = (Point(4096, 16, 32, 8),)
REHEARSAL: Final = (Point(64, 8, 3, 2),)
SHIPPED: Final = "shipped"
SPLITS: Final = (4, 8, 16)
CLOSE: Final = 0.02
"""Share of the largest element that another order of summation may change."""


@dataclass(frozen=True)
class Candidate:
    """Tiles for both halves."""

    shrink: ShrinkConfig
    expand: ExpandConfig

    def __str__(self) -> str:
        s, e = self.shrink, self.expand
        return (
            f"r{s.block_r} k{s.block_k} split{s.split_k} w{s.num_warps} s{s.num_stages} | "
            f"n{e.block_n} few{e.few_n} w{e.num_warps}"
        )

    def launches(self, linear: Linear) -> list[Launch]:
        """The launches of a linear with these tiles instead of the shipped ones."""
        shrink, expand = linear.plan()
        group, capacity, features = linear.group, linear.segments.capacity, linear.x.shape[1]
        numel = self.shrink.numel(features, group.max_rows, capacity)
        planes = {"p_y": torch.empty(numel, dtype=torch.float32, device=linear.x.device)}
        blocks = {"blocks": -(-features // self.shrink.block_k), "split_k": self.shrink.split_k}
        first = replace(
            shrink,
            grid=(self.shrink.grid(features, group.max_rows, capacity.segments),),
            arguments=shrink.arguments | planes | blocks | self._shrink_arguments(),
        )
        second = replace(
            expand,
            grid=(self.expand.grid(group.slices, capacity.segments_per_pass),),
            arguments=expand.arguments | planes | self._expand_arguments(self.shrink.planes(features, 1)[0]),
        )
        return [first, second]

    def _shrink_arguments(self) -> dict[str, Any]:
        return {
            "BLOCK_R": self.shrink.block_r,
            "BLOCK_K": self.shrink.block_k,
            "num_warps": self.shrink.num_warps,
            "num_stages": self.shrink.num_stages,
        }

    def _expand_arguments(self, most_planes: int) -> dict[str, Any]:
        return {
            "PLANES": 1 << (most_planes - 1).bit_length(),
            "BLOCK_R": self.expand.block_r,
            "BLOCK_N": self.expand.block_n,
            "FEW_N": self.expand.few_n,
            "num_warps": self.expand.num_warps,
            "num_stages": self.expand.num_stages,
        }


@dataclass(frozen=True)
class Mixture:
    """A grouped product of rows that are dealt out to experts."""

    rows: int
    experts: int = 128
    top_k: int = 8
    width: int = 2048
    columns: int = 1536


def run(run: Run) -> None:
    """Time all candidates of every point; put down the shipped tiles and the best others."""
    run.each(run.choose(FULL, QUICK, REHEARSAL), lambda point: _tune(run, point))
    mixtures = run.choose((Mixture(8), Mixture(64), Mixture(4096)), (Mixture(8),), (Mixture(3, 5, 2, 32, 24),))
    run.each(mixtures, lambda mixture: _tune_experts(run, mixture))


def _tune_experts(run: Run, mixture: Mixture) -> None:
    """Time tiles of the grouped product of gate and up."""
    where, dtype = run.device.where, run.device.dtype
    x = torch.randn(mixture.rows, mixture.width, dtype=dtype, device=where)
    weight = torch.randn(mixture.experts, mixture.columns, mixture.width, dtype=dtype, device=where)
    ids = torch.rand(mixture.rows, mixture.experts, device=where).topk(mixture.top_k).indices.int()
    pairs = by_expert(ids, mixture.experts)
    taken: list[Launch] = []
    with intercepted(taken.append):
        out = grouped(x, weight, pairs, of_tokens=True)
    (shipped,) = taken
    shipped.enqueue()
    expected, found = out.float(), {SHIPPED: _timed(run, shipped)}
    for sizes in product((32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)):
        if run.left_s <= 0 or (run.device.rehearses and len(found) > 1):
            break
        config = GroupedConfig(*sizes)
        grid = -(-mixture.columns // config.block_n), shipped.grid[1]
        names = "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
        tiles = dict(zip(names, sizes, strict=True))
        launch = replace(shipped, grid=grid, arguments=shipped.arguments | tiles)
        taken_us = _where_it_fits(run, str(config), partial(_same, run, launch, out, expected))
        if taken_us is not None:
            found[str(config)] = taken_us
    ranked = sorted(found, key=found.__getitem__)
    for name in dict.fromkeys([SHIPPED, *ranked[:5]]):
        at = {"linear": f"experts {mixture.rows} x {mixture.top_k} of {mixture.experts}", "tiles": name}
        run.add(at, {"us": found[name], "of best": found[name] / found[ranked[0]], "tried": len(found)})


def _same(run: Run, launch: Launch, out: Tensor, expected: Tensor) -> float | None:
    """Return microseconds; None where the result is another."""
    out.fill_(torch.nan)
    launch.enqueue()
    if not (out.float() - expected).abs().max() <= CLOSE * expected.abs().max():
        run.note(f"{launch.arguments} computes something else")
        return None
    return _timed(run, launch)


def _timed(run: Run, launch: Launch) -> float:
    return replayed(run.device, [launch]).median_us


def candidates(rank: int) -> Iterator[Candidate]:
    """Tiles of decode for a rank."""
    block_r = max(16, 1 << (min(rank, 64) - 1).bit_length())
    for block_k, split_k, warps in product((128, 256), SPLITS, (2, 4, 8)):
        shrink = ShrinkConfig(DECODE_TILE, 16, block_k, split_k, num_warps=warps, num_stages=3)
        for block_n, few_n in ((64, 16), (64, 32), (128, 32)):
            yield Candidate(shrink, ExpandConfig(DECODE_TILE, block_r, block_n, few_n, 4, num_stages=1))


def _tune(run: Run, point: Point) -> None:
    device = run.device
    linear = Linear.make(device, point)
    linears = [linear, *(Linear.make(device, point) for _ in range(copies_of(device, linear.num_bytes) - 1))]
    before = linear.out.clone()
    expected = _result(linear, before, linear.plan())
    found = {SHIPPED: _time(run, linears, Linear.plan)}
    tried = run.choose((*candidates(point.rank),), (*candidates(point.rank),), (*candidates(point.rank),)[::20])
    for candidate in tried:
        if run.left_s <= 0:
            run.note(f"out of time at {candidate} of {point}")
            break
        taken = _try(run, linears, candidate, before, expected)
        if taken is not None:
            found[str(candidate)] = taken
    ranked = sorted(found, key=found.__getitem__)
    for name in dict.fromkeys([SHIPPED, *ranked[:5]]):
        at = {"linear": f"{point.hidden} r{point.rank} {point.batch}x{point.adapters}", "tiles": name}
        run.add(at, {"us": found[name], "of best": found[name] / found[ranked[0]], "tried": len(found)})


def _try(
    run: Run, linears: list[Linear], candidate: Candidate, before: Tensor, expected: Tensor
) -> float | None:
    """Return microseconds; None where the device has no room for it, or the result is another."""

    def taken_us() -> float | None:
        got = _result(linears[0], before, candidate.launches(linears[0]))
        if not (got - expected).abs().max() <= CLOSE * expected.abs().max():
            run.note(f"{candidate} computes something else")
            return None
        return _time(run, linears, candidate.launches)

    return _where_it_fits(run, str(candidate), taken_us)


def _where_it_fits(run: Run, name: str, work: Callable[[], float | None]) -> float | None:
    from triton.runtime.errors import OutOfResources, PTXASError  # chosen after the interpreter is

    try:
        return work()
    except (OutOfResources, PTXASError) as error:
        run.say(f"{name}: {error}")
    return None


def _result(linear: Linear, before: Tensor, launches: list[Launch]) -> Tensor:
    linear.out.copy_(before)
    for launch in launches:
        launch()
    return linear.out.float()


def _time(run: Run, linears: list[Linear], plan: Callable[[Linear], list[Launch]]) -> float:
    plans = [plan(linear) for linear in linears]
    return replayed(run.device, [partial(_launch, launches) for launches in plans]).median_us


def _launch(launches: list[Launch]) -> None:
    for launch in launches:
        launch()
