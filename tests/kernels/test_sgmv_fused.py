"""Shrink and expand in one launch. The interpreter shows no races: of those, the kernel itself speaks."""

import dataclasses
from typing import Any

import pytest
import torch

from inference_service.kernels.launch import Launch
from inference_service.kernels.sgmv import PREFILL_TILE, Phase, Slices, lora_apply, pack_segments, plan
from inference_service.kernels.sgmv.fused_launch import fuse
from inference_service.kernels.sgmv.tuning import fused_config
from tests.kernels.sgmv_case import GUARD, TOLERANCE, Case, make_case, make_group, relative_errors
from tests.kernels.test_sgmv import CASES

RANKS = [(4, 8), (12, 0), (16, 16), (8, 5), (4, 4)]
DONE = 1000
"""A counter that no one waits for any more."""


def small_case(device: str, **changes: Any) -> Case:
    """Five adapters of two slices, two planes, room for 14 entries."""
    options = {"slots": [0, 3, -1, 1, 2, 4, 0, 1, 1], "ranks": RANKS, "K": 100, "sizes": (64, 33)}
    return make_case(**{"dtype": torch.float32, "device": device, **options, **changes})


def fused(case: Case) -> Launch:
    """The one launch."""
    (launch,) = plan(case.x, case.out, case.group, case.segments, case.workspace, fused=True)
    return launch


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mixed ranks and base", torch.bfloat16),
        ("odd sizes", torch.float16),
        ("one slice", torch.float32),
        ("one token each", torch.bfloat16),
        ("all base", torch.float16),
        ("a run longer than a tile", torch.float32),
        ("composition", torch.float32),
        ("composition", torch.bfloat16),
    ],
    ids=str,
)
def test_updates_match_fp64_and_nothing_else_changes(name: str, dtype: torch.dtype, device: str) -> None:
    """One launch does what two do, and further passes are added behind it."""
    case = make_case(**CASES[name], dtype=dtype, device=device)
    before = case.out.clone()
    launches = plan(case.x, case.out, case.group, case.segments, case.workspace, fused=True)
    assert len(launches) == case.segments.capacity.passes
    for launch in launches:
        launch()
    assert relative_errors(case.out, before, case).max() <= TOLERANCE[dtype]
    assert torch.equal(case.out[:, -GUARD:], before[:, -GUARD:])
    assert not case.segments.counters.any()


def test_counters_are_clear_for_whatever_linear_follows(device: str) -> None:
    """Linears of other widths and ranks share the segments' counters, launch after launch, step after step."""
    case = small_case(device)
    other = make_group([(5,), (0,), (16,), (0,), (1,)], 100, Slices((0,), (80,)), torch.float32, device)
    for _ in range(2):
        for group in (case.group, other):
            before = case.out.clone()
            workspace = torch.full_like(case.workspace, torch.nan)
            lora_apply(case.x, case.out, group, case.segments, workspace, fused=True)
            assert relative_errors(case.out, before, dataclasses.replace(case, group=group)).max() <= 1e-5
            assert not case.segments.counters.any()


def test_a_captured_launch_serves_more_adapters_at_replay(device: str) -> None:
    """The grid and all arguments depend on capacities: a replay is right for segments it has never seen."""
    case = small_case(device, slots=[-1, 2, -1, -1, -1, -1, -1, -1, -1])
    case.x.copy_(torch.randn_like(case.x))
    captured = fused(case)
    for later in ([i % 5 for i in range(9)], [-1] * 9, [4] * 9):
        case.segments.load(torch.from_numpy(pack_segments(case.segments.capacity, later)))
        case.workspace.fill_(torch.nan)
        before = case.out.clone()
        captured()
        assert relative_errors(case.out, before, case).max() <= TOLERANCE[torch.float32]
        assert not case.segments.counters.any()


@pytest.mark.parametrize("programs", [2, 3, 7, 100])
def test_any_number_of_programs_does_every_tile_once(programs: int, device: str) -> None:
    """Tiles are dealt out to the grid; with y there and no one waiting, programs may run one by one."""
    case = small_case(device)
    before = case.out.clone()
    launch = fused(case)
    launch()
    alone = case.out.clone()

    case.out.copy_(before)
    active = torch.arange(len(case.segments.seg_slot), device=device) < case.segments.pass_start[-2]
    case.segments.counters[:, 0] = DONE
    dataclasses.replace(launch, grid=(programs,))()
    assert torch.equal(case.out, alone)
    slots = case.segments.seg_slot[active].long()
    rows = case.group.table[slots, :, 0]
    writers = 2 * -(-rows.sum(1) // 16)
    readers = (rows > 0).sum(1)  # slices of at most a tile of 64 columns
    assert torch.equal(case.segments.counters[active, 0].long(), DONE + writers + readers)
    assert (case.segments.counters[~active, 0] == DONE).all()


@pytest.mark.parametrize(("resident", "programs"), [(1, 1), (7, 7), (1000, 20)])
def test_the_grid_never_exceeds_what_is_resident(resident: int, programs: int, device: str) -> None:
    """A program that is not resident could not do what resident ones wait for; none is idle either."""
    case = small_case(device)
    shrink, expand = plan(case.x, case.out, case.group, case.segments, case.workspace, fused=False)
    config = fused_config(80, Phase.DECODE, torch.float32, max_rank=16)
    assert config is not None
    launch = fuse(shrink, expand, config, case.segments, case.group.slices, resident)
    assert case.segments.capacity.segments == 5
    assert launch.grid == (programs,)  # 2 planes x 2 tiles of rows, 2 tiles of columns, of 5 segments


def test_what_is_not_shipped_is_refused(device: str) -> None:
    """Prefill, and ranks above the largest bucket, have no fused kernel."""
    for changes in ({"tile": PREFILL_TILE}, {"ranks": [(17, 1)] * 5}):
        case = small_case(device, **changes)
        with pytest.raises(ValueError, match="no fused kernel"):
            case.run(fused=True)
