"""Other tiles than those of the tables of SGMV and of experts: which win, bucket by bucket.

A launch is a value, so a candidate is the shipped launches with other tiles in them. Candidates that do not
fit the device are left out, and so are those whose result differs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.sgmv import Linear, Point, all_of
from inference_service.engine.kernels.experts import by_expert, grouped
from inference_service.engine.kernels.experts.tuning import GroupedConfig
from inference_service.engine.kernels.launch import Launch, intercepted
from inference_service.engine.kernels.sgmv import launch as launcher
from inference_service.engine.kernels.sgmv.tuning import DECODE_TILE, ExpandConfig, ShrinkConfig

POINTS: Final = (
    Point(4096, 16, 1, 1),
    Point(4096, 16, 32, 8),
    Point(4096, 16, 64, 64),
    Point(4096, 64, 64, 16),
    Point(8192, 64, 64, 64),
)
SHIPPED: Final = "shipped"
CLOSE: Final = 0.02
"""Share of the largest element that another order of summation may change."""
Tiles = Mapping[str, Callable[[], list[Launch]]]
"""Launches by the name of their tiles."""


@dataclass(frozen=True)
class Mixture:
    """A grouped product of rows that are dealt out to experts: gate and up."""

    rows: int
    experts: int = 128
    top_k: int = 8
    width: int = 2048
    columns: int = 1536


MIXTURES: Final = (Mixture(8), Mixture(64), Mixture(4096))


def run(run: Run) -> None:
    """Time all candidates of every point; put down the shipped tiles and the best others."""
    run.each(run.choose(POINTS, (Point(64, 8, 3, 2),)), lambda point: _tune_linear(run, point))
    run.each(run.choose(MIXTURES, (Mixture(3, 5, 2, 32, 24),)), lambda mixture: _tune_experts(run, mixture))


def _tune_linear(run: Run, point: Point) -> None:
    linear = Linear.make(run.device, point)
    name = f"{point.hidden} r{point.rank} {point.batch}x{point.adapters}"
    _tune(run, name, linear.out, {SHIPPED: linear.plan, **dict(candidates(linear, point.rank))})


def candidates(linear: Linear, rank: int) -> Iterator[tuple[str, Callable[[], list[Launch]]]]:
    """Yield launches with other tiles of decode."""
    block_r = max(16, 1 << (min(rank, 64) - 1).bit_length())
    for block_k, split_k, warps in product((128, 256), (4, 8, 16), (2, 4, 8)):
        shrink = ShrinkConfig(DECODE_TILE, 16, block_k, split_k, num_warps=warps, num_stages=3)
        for block_n, step_n in ((64, 16), (128, 16), (256, 32)):
            expand = ExpandConfig(DECODE_TILE, block_r, block_n, step_n, 4, num_stages=1)
            name = f"k{block_k} split{split_k} w{warps} | n{block_n} step{step_n}"
            yield name, lambda s=shrink, e=expand: _with_tiles(linear, s, e)  # type: ignore[misc]


def _with_tiles(linear: Linear, shrink: ShrinkConfig, expand: ExpandConfig) -> list[Launch]:
    """Return the launches of a linear with these tiles instead of the shipped ones."""
    with (
        patch.object(launcher, "shrink_config", lambda *_, **__: shrink),
        patch.object(launcher, "expand_config", lambda *_, **__: expand),
    ):
        numel = launcher.workspace_numel(linear.group, linear.segments)
        return replace(linear, workspace=torch.empty(numel, device=linear.x.device)).plan()


def _tune_experts(run: Run, mixture: Mixture) -> None:
    where, dtype = run.device.where, run.device.dtype
    x = torch.randn(mixture.rows, mixture.width, dtype=dtype, device=where)
    weight = torch.randn(mixture.experts, mixture.columns, mixture.width, dtype=dtype, device=where)
    ids = torch.rand(mixture.rows, mixture.experts, device=where).topk(mixture.top_k).indices.int()
    pairs = by_expert(ids, mixture.experts)
    taken: list[Launch] = []
    with intercepted(taken.append):
        out = grouped(x, weight, pairs, of_tokens=True)
    (shipped,) = taken
    found: dict[str, Callable[[], list[Launch]]] = {SHIPPED: lambda: [shipped]}
    for sizes in product((32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)):
        config = GroupedConfig(*sizes)
        grid = -(-mixture.columns // config.block_n), shipped.grid[1]
        tiles = dict(zip(("BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), sizes, strict=True))
        launch = replace(shipped, grid=grid, arguments=shipped.arguments | tiles)
        found[str(config)] = lambda launch=launch: [launch]  # type: ignore[misc]
    _tune(run, f"experts {mixture.rows} x {mixture.top_k} of {mixture.experts}", out.zero_(), found)


def _tune(run: Run, name: str, out: Tensor, tiles: Tiles) -> None:
    """Time launches that add to out, or write it; the first ones are right."""
    from triton.runtime.errors import OutOfResources, PTXASError  # chosen after the interpreter is

    before, expected, found = out.clone(), out.float(), dict[str, float]()
    for tile in run.choose(list(tiles), [SHIPPED, list(tiles)[-1]]):
        if run.left_s <= 0:
            run.note(f"out of time at {tile} of {name}")
            break
        try:
            launches = tiles[tile]()
            out.copy_(before)
            all_of(launches)()
            if tile == SHIPPED:
                expected = out.float()
            if not (out.float() - expected).abs().max() <= CLOSE * expected.abs().max():
                run.note(f"{tile} of {name} computes something else")
                continue
            found[tile] = run.device.replayed_us([all_of(launches)])
        except (OutOfResources, PTXASError) as error:
            run.say(f"{tile}: {error}")
    put(run, name, found)


def put(run: Run, name: str, found: Mapping[str, float]) -> None:
    """Put down the shipped tiles and the five best."""
    ranked: Sequence[str] = sorted(found, key=found.__getitem__)
    for tile in dict.fromkeys([SHIPPED, *ranked[:5]]):
        figures = {"us": found[tile], "of best": found[tile] / found[ranked[0]], "tried": len(found)}
        run.add({"linear": name, "tiles": tile}, figures)
