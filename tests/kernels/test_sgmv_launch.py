"""SGMV's launcher: which changes a captured launch survives, and which are refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from inference_service.kernels.launch import planned
from inference_service.kernels.sgmv import DECODE_TILE, Slices, lora_apply, pack_segments
from inference_service.kernels.sgmv.tuning import COVERING
from tests.kernels.sgmv_case import TOLERANCE, Case, make_case, make_group, relative_errors

RANKS = [(4, 8), (12, 0), (16, 16), (8, 5), (4, 4)]


def small_case(device: str, slots: Sequence[int] = (0,) * 20) -> Case:
    """Five adapters of two slices, room for 25 entries."""
    return make_case(slots, RANKS, 100, (64, 33), device=device)


@pytest.mark.parametrize("captured", [[-1] * 20, [0] * 20], ids=["base only", "one adapter"])
def test_a_captured_launch_serves_more_adapters_at_replay(captured: list[int], device: str) -> None:
    """A grid frozen at capture covers every later step: it depends on capacities, not on the step."""
    case = small_case(device, slots=captured)
    case.x.copy_(torch.randn_like(case.x))
    _, graph = planned(lora_apply, case.x, case.out, case.group, case.segments, case.workspace)

    later = [i % 5 for i in range(20)]
    case.segments.load(torch.from_numpy(pack_segments(case.segments.capacity, later)))
    case.workspace.fill_(torch.nan)
    before = case.out.clone()
    for launch in graph:
        launch()
    replayed = case.out.clone()

    case.out.copy_(before)
    case.run()
    assert torch.equal(replayed, case.out)
    assert relative_errors(replayed, before, case).max() <= TOLERANCE[torch.float32]


def test_a_captured_launch_serves_adapters_that_were_loaded_later(device: str) -> None:
    """Ranks and offsets are read on the device, so a slot may change its adapter between replays."""
    case = small_case(device, slots=[0, 1, 2, 3])
    _, graph = planned(lora_apply, case.x, case.out, case.group, case.segments, case.workspace)

    loaded = make_group(RANKS[::-1], 100, case.group.slices, torch.float32, device)
    case.group.weights.copy_(loaded.weights)
    case.group.table.copy_(loaded.table)
    before = case.out.clone()
    for launch in graph:
        launch()
    assert relative_errors(case.out, before, case).max() <= TOLERANCE[torch.float32]


def test_grids_are_those_of_the_largest_step_or_cover_the_device(device: str) -> None:
    """No program is launched that could never find work; a step of many segments is done in loops."""
    case = small_case(device)
    _, (first, second) = planned(lora_apply, case.x, case.out, case.group, case.segments, case.workspace)
    assert case.segments.capacity.segments == len(RANKS) + 25 // DECODE_TILE
    assert first.grid == (6 * 2 * 2,)  # segments, tiles of 32 rows, planes of K = 64 + 36
    assert second.grid == (6 * 7,)  # segments, narrow tiles of 64 + 33 columns
    many = make_case(range(70), [(16,)] * 70, 640, (6400,), device=device)
    _, (first, second) = planned(lora_apply, many.x, many.out, many.group, many.segments, many.workspace)
    assert first.grid == (COVERING,)
    assert second.grid == (400,)  # narrow tiles of one segment


REFUSALS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "the same rows": lambda case: {"out": case.out[1:]},
    "the same K": lambda case: {"x": case.x[:, 1:]},
    "x must be contiguous in its last": lambda case: {"x": case.x.T.contiguous().T},
    "x must have 2 dimensions": lambda case: {"x": case.x[:, None]},
    "weights must be torch.float16": lambda case: {"out": case.out.half()},
    "compute in": lambda case: {"out": case.out.double()},
    "out must have 97 columns": lambda case: {"out": case.out[:, :96]},
    "workspace must hold": lambda case: {"workspace": case.workspace[1:]},
    "workspace must be torch.float32": lambda case: {"workspace": case.workspace.half()},
    "segments have 5 slots, table only 4": lambda case: {
        "group": replace(case.group, table=case.group.table[:4])
    },
    "table must be int32 or int64": lambda case: {"group": replace(case.group, table=case.group.table.float())},
    "must be on meta": lambda case: {"x": case.x.to("meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(message: str, device: str) -> None:
    """A ValueError names the tensor, the expected shape or type, and the actual one."""
    case = small_case(device)
    with pytest.raises(ValueError, match=message):
        replace(case, **REFUSALS[message](case)).run()


def test_slices_must_not_overlap() -> None:
    """Two slices that share a column would race."""
    assert Slices.consecutive(192, 64, 64) == Slices((0, 192, 256), (192, 64, 64))
    with pytest.raises(ValueError, match="must not overlap"):
        Slices((0, 8), (16, 16))
