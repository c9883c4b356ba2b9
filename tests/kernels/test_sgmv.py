"""SGMV's kernels against fp64: odd shapes, mixed ranks, poisoned memory."""

import dataclasses
from functools import partial

import pytest
import torch

from inference_service.kernels.sgmv import PREFILL_TILE, shrink
from tests.kernels.sgmv_case import GUARD, expect_right, make_case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MIXED = [(4, 8, 0), (12, 12, 12), (0, 0, 64), (0, 0, 0), (16, 5, 1)]

CASES = {
    "mixed ranks and base": partial(
        make_case, [4, 0, -1, 2, 1, 0, 3, -1, 2, 1, 1, 4], MIXED, 576, (192, 64, 64)
    ),
    "odd sizes": partial(make_case, [1, 1, 0, -1, 2, 0, 1], [(5, 12), (64, 4), (8, 0)], 63, (33, 17)),
    "one slice": partial(make_case, [0, 2, -1, 2, 1], [(16,), (8,), (4,)], 100, (576,)),
    "one token each": partial(make_case, [3, 1, 0, 2, 4], MIXED, 100, (64, 64, 17)),
    "all base": partial(make_case, [-1] * 6, MIXED, 100, (192, 64, 64)),
    "rank 256": partial(make_case, [1, 0, -1, 1], [(256,), (4,)], 100, (100,)),
    "a run longer than a tile": partial(make_case, [0] * 20 + [1] * 2, [(8,), (12,)], 63, (64,)),
    "prefill of one adapter": partial(make_case, [0] * 70, [(16, 0, 4)], 100, (192, 64, 64), tile=PREFILL_TILE),
    "prefill beside decode": partial(
        make_case,
        [1] * 40 + [0, -1, 2] + [1] * 30,
        [(4, 4), (64, 16), (8, 0)],
        63,
        (100, 33),
        tile=PREFILL_TILE,
    ),
    "parts of few segments": partial(
        make_case, [1] * 70 + [4] * 3 + [0] * 2, MIXED, 100, (192, 64, 64), tile=PREFILL_TILE
    ),
    "composition": partial(
        make_case,
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
