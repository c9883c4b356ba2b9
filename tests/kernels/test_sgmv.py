"""SGMV against fp64: kernels, the packing of segments and tables, refusals of the launcher, and tuning."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from inference_service.engine.kernels.launch import ARCHITECTURES, DTYPES
from inference_service.engine.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    Group,
    SegmentCapacity,
    Segments,
    Slices,
    pack_segments,
    pack_table,
    shrink,
    tuning,
)
from loramux_shared.bases.groups import GroupShape, layer_groups
from tests.kernels.sgmv_case import GUARD, Case, expect_right, make_case
from tests.support.cases import cases

MIXED = [(4, 8, 0), (12, 12, 12), (0, 0, 64), (0, 0, 0), (16, 5, 1)]

of: Any = partial(partial, make_case)
CASES = {
    "mixed ranks and base": of([4, 0, -1, 2, 1, 0, 3, -1, 2, 1, 1, 4], MIXED, 576, (192, 64, 64)),
    "odd sizes": of([1, 1, 0, -1, 2, 0, 1], [(5, 12), (64, 4), (8, 0)], 63, (33, 17)),
    "one slice": of([0, 2, -1, 2, 1], [(16,), (8,), (4,)], 100, (576,)),
    "one token each": of([3, 1, 0, 2, 4], MIXED, 100, (64, 64, 17)),
    "all base": of([-1] * 6, MIXED, 100, (192, 64, 64)),
    "rank 256": of([1, 0, -1, 1], [(256,), (4,)], 100, (100,)),
    "a run longer than a tile": of([0] * 20 + [1] * 2, [(8,), (12,)], 63, (64,)),
    "prefill of one adapter": of([0] * 70, [(16, 0, 4)], 100, (192, 64, 64), tile=PREFILL_TILE),
    "prefill beside decode": of(
        [1] * 40 + [0, -1, 2] + [1] * 30, [(4, 4), (64, 16), (8, 0)], 63, (100, 33), tile=PREFILL_TILE
    ),
    "parts of few segments": of([1] * 70 + [4] * 3 + [0] * 2, MIXED, 100, (192, 64, 64), tile=PREFILL_TILE),
    "composition": of(
        *([0, 1, 2, 1, 0, -1, 1, 0, 2], [(8, 4), (0, 12), (16, 16)], 63, (64, 33)),
        token_ids=[4, 4, 4, 0, 2, 3, 2, 1, 0],
        scales=[0.5, 2, -1, 1, 0.25, 9, 3, 0, 1],
        passes=3,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_updates_match_fp64_and_nothing_else_changes(name: str, dtype: torch.dtype, device: str) -> None:
    """Every update is as exact as its dtype allows; base rows and foreign columns keep their bits."""
    case = CASES[name](dtype=dtype, device=device)
    before = expect_right(case)
    base = case.x.isnan().all(1)
    assert torch.equal(case.out[base], before[base])
    assert torch.equal(case.out[:, -GUARD:], before[:, -GUARD:])


def test_a_slice_of_rank_zero_keeps_its_bits(device: str) -> None:
    """A slice that an adapter does not adapt is not even rewritten."""
    case = make_case([0, 0], [(4, 0, 8)], 63, (32, 32, 32), dtype=torch.bfloat16, device=device)
    case.out[:, 32:64] = -0.0  # even adding nothing would make it +0.0
    before = case.out.clone()
    case.run()
    assert torch.equal(case.out[:, 32:64].view(torch.int16), before[:, 32:64].view(torch.int16))
    assert not torch.equal(case.out[:2, :32], before[:2, :32])


def test_idle_planes_do_not_exist_and_unused_rows_are_not_written(device: str) -> None:
    """Shrink writes exactly the rows of an entry's slot, in as many planes as K has work for."""
    case = make_case([0, 1], [(4,), (12,)], 576, (16,), device=device, spare=1)
    shrink(case.x, case.group, case.segments, case.workspace)()
    used = 9 * 2 * 12  # 9 blocks of 64, fewer than the 16 planes that there may be, of two entries
    assert case.workspace[used:].isnan().all()
    y = case.workspace[:used].view(9, 2, 12)
    assert y[:, 0, 4:].isnan().all()
    expected = case.x[0].double() @ case.group.weights[GUARD : GUARD + 4 * 576].view(4, 576).double().T
    torch.testing.assert_close(y[:, 0, :4].sum(0).double(), expected, rtol=1e-5, atol=1e-5)


def test_programs_find_their_tiles_among_many_segments_of_all_ranks(device: str) -> None:
    """Programs find their tiles among more segments than one look covers, some without a row of A."""
    ranks = [(rank, 0) for rank in (0, 3, 20, 0, 40)] * 30
    expect_right(make_case(range(150), ranks, 40, (32, 16), device=device, spare=9))


def test_a_segment_longer_than_the_tile_loses_no_token(device: str) -> None:
    """The kernels walk a segment to its end, whatever the packing promised."""
    case = make_case([0] * 20, [(8,)], 63, (64,), device=device)
    case.segments.seg_start[1:] = 20
    case.segments.pass_start[1] = 1
    expect_right(case)


def test_addresses_beyond_32_bits_are_right(device: str) -> None:
    """Rows of x and out, rows of A, blocks of B and vectors may begin behind the first 2**31 elements."""
    case = make_case([1, -1, 0, 1], [(4,), (16,)], 63, (64,), dtype=torch.float16, device=device, spare=1)
    group, shift = case.group, 2**31
    x, out = (_far_rows(tensor) for tensor in (case.x, case.out))
    weights = torch.empty(shift + len(group.weights), dtype=torch.float16, device=device)
    weights[shift:] = group.weights
    group.table[..., 1:] += shift * (group.table[..., 1:] > 0)
    far = dataclasses.replace(case, x=x, out=out, group=dataclasses.replace(group, weights=weights))
    before = expect_right(far)
    assert not torch.equal(out[-2], before[-2])


def _far_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last rows begin behind 2**31 elements."""
    rows, columns = tensor.shape
    return tensor.new_empty_strided((rows, columns), (2**31 // (rows - 2), 1)).copy_(tensor)


RANKS = [(4, 8), (12, 0), (16, 16), (8, 5), (4, 4)]
REFUSALS: dict[str, Callable[[Case], dict[str, Any]]] = {
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
    case = make_case([0] * 20, RANKS, 100, (64, 33), device=device)
    with pytest.raises(ValueError, match=message):
        replace(case, **REFUSALS[message](case)).run()


def test_slices_must_not_overlap() -> None:
    """Two slices that share a column would race."""
    assert Slices.consecutive(192, 64, 64) == Slices((0, 192, 256), (192, 64, 64))
    with pytest.raises(ValueError, match="must not overlap"):
        Slices((0, 8), (16, 16))


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 9), st.integers(-1, 4)), max_size=40, unique_by=lambda entry: entry
    ),
    tile=st.integers(1, 8),
)
def test_every_entry_is_in_one_segment_of_its_slot(entries: list[tuple[int, int]], tile: int) -> None:
    """Packing keeps every entry and its scale, cuts at the tile, and never puts a token twice in a pass."""
    tokens, slots = [token for token, _ in entries], [slot for _, slot in entries]
    capacity = SegmentCapacity(entries=40, slots=5, tile=tile, passes=5, scaled=True)
    segments = Segments.allocate(capacity, "cpu")
    scales = np.arange(len(entries)) + 0.5
    segments.load(torch.from_numpy(pack_segments(capacity, slots, token_ids=tokens, scales=scales)))

    found = []
    for index in range(capacity.passes):
        starts, owners = segments.seg_start.tolist(), segments.seg_slot.tolist()
        in_pass: list[int] = []
        for i in range(*segments.of_pass(index).tolist()):
            slot, members = owners[i], range(starts[i], starts[i + 1])
            assert 1 <= len(members) <= tile
            in_pass += segments.token_ids[list(members)].tolist()
            found += [(int(segments.token_ids[p]), slot, float(segments.scales[p])) for p in members]
        assert len(set(in_pass)) == len(in_pass)
    assert sorted(found) == sorted(
        (token, slot, float(scale)) for (token, slot), scale in zip(entries, scales, strict=True) if slot >= 0
    )


def test_arrays_begin_at_multiples_of_16_bytes() -> None:
    """The one buffer of a step holds its arrays aligned, as the kernels were specialised."""
    capacity = SegmentCapacity(entries=7, slots=3, tile=16, scaled=True)
    assert {where.start % 4 for where in capacity.sections.values()} == {0}
    assert capacity.sections["scales"].stop <= capacity.packed_size


@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [
        ([0] * 9, None, "9 entries, but room for 8"),
        ([0, 3], None, "slot 3, but only 3 slots"),
        ([0, 1], [5, 5], "a token has 2 entries, but only 1 passes"),
        ([0, 1, 2], None, "3 different slots, but room for 2"),
    ],
)
def test_a_step_beyond_the_capacity_is_refused(slots: list[int], tokens: list[int], message: str) -> None:
    """A step above the capacity in entries, slots or adapters is refused, and so is a token in two segments."""
    with pytest.raises(ValueError, match=message):
        pack_segments(SegmentCapacity(entries=8, slots=3, tile=16, active=2), slots, token_ids=tokens)


def test_scales_need_room() -> None:
    """Scales that the device buffers cannot hold are refused, not ignored."""
    with pytest.raises(ValueError, match="no room"):
        pack_segments(SegmentCapacity(entries=8, slots=3, tile=16), [0], scales=[2.0])


def test_a_table_is_packed_without_gaps() -> None:
    """Slot by slot A of all slices, then B; rows of 9 elements and blocks of any begin at multiples of 16."""
    table = pack_table([(4, 0), (8, 2)], Slices.consecutive(32, 9), 9)
    assert table.tolist() == [[[4, 0, 64, 0], [0, 64, 192, 0]], [[8, 192, 352, 0], [2, 320, 608, 0]]]


@pytest.mark.parametrize(("entry", "message"), cases(__file__, "MISLEADING"))
def test_a_table_that_misleads_a_kernel_is_refused(entry: tuple[int, int, list[int]], message: str) -> None:
    """Kernels trust the table; the bank checks it once per load."""
    slices = Slices.consecutive(32, 16)
    table = pack_table([(4, 0), (8, 2)], slices, 8)
    group = Group(torch.empty(640), torch.from_numpy(table.copy()), slices, 8, max_rank=16, max_rows=16)
    group.check_table(table)
    slot, index, values = entry
    table[slot, index] = values
    with pytest.raises(ValueError, match=message):
        group.check_table(table)


MODELS = {
    "SmolLM2-135M": layer_groups(hidden=576, intermediate=1536, q=576, kv=192),
    "Qwen2.5-1.5B": layer_groups(hidden=1536, intermediate=8960, q=1536, kv=256),
    "Llama-3-70B": layer_groups(hidden=8192, intermediate=28672, q=8192, kv=1024),
}
LINEARS = [(name, shape) for name, groups in MODELS.items() for shape in groups]
SERVED_RANKS = (1, 8, 12, 16, 32, 64, 128, 256)
SEGMENTS = (1, 3, 8, 64, 130, 300)


@pytest.mark.parametrize(("model", "shape"), LINEARS, ids=lambda value: getattr(value, "name", value))
def test_planes_partition_k_and_grids_cover_the_device(model: str, shape: GroupShape) -> None:
    """No plane is idle, and a launch has no more programs than could find work, or than cover the device."""
    slices = Slices(shape.out_offsets, shape.out_features)
    for architecture, tile, dtype, rank in product(
        ARCHITECTURES, (DECODE_TILE, PREFILL_TILE), DTYPES, SERVED_RANKS
    ):
        phase, rows = tuning.phase_of(tile), rank * len(shape.modules)
        first = tuning.shrink_config(architecture, phase, dtype, max_rows=rows)
        second = tuning.expand_config(architecture, phase, dtype, max_rank=rank)
        blocks = -(-shape.in_features // first.block_k)
        for segments in SEGMENTS:
            planes, per_plane = first.planes(shape.in_features, segments)
            assert (planes - 1) * per_plane < blocks <= planes * per_plane
            assert planes <= first.split_k
            grid = first.grid(shape.in_features, rows, SegmentCapacity(segments, 300, tile))
            assert 1 <= grid <= min(tuning.COVERING, segments * -(-rows // first.block_r) * first.split_k)
            programs, widest, step = second.grid(slices, segments), second.block_n, second.step_n
            assert 1 <= programs <= min(segments * slices.tiles(step), tuning.PLACES)
            width = tuning.width_of(slices, segments, programs, widest, step)
            in_turn = [-(-segments * slices.tiles(each) // programs) for each in (width, widest)]
            assert width in range(step, widest + 1, step)
            assert in_turn[0] <= in_turn[1]
