"""Attention's kernels against fp64: odd shapes, scattered blocks, poisoned memory."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from inference_service.engine.kernels.attention import pack_tables
from inference_service.engine.kernels.attention.paged import narrowed
from tests.kernels.attention_case import TOLERANCE, Heads, Layout, errors, expect_right, fill, make_case

SKEWED = [(1, 4000)] + [(1, 20)] * 31
PREFIX = [(33, 4033)]
BOTH = Layout([*SKEWED[:3], *PREFIX])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

of: Any = partial(partial, make_case)
CASES = {
    "decode": of(Layout([(1, 1), (1, 15), (1, 16), (1, 17), (1, 63)], padding=2)),
    "decode in pieces": of(Layout([(1, 300), (1, 100), (1, 129)], spare=2, decode_only=True), Heads(4, 1, 32)),
    "one chunk of every kind": of(Layout([(1, 40), (20, 20), (7, 90), (1, 1), (2, 17)], padding=3, spare=1)),
    "large blocks, a group of 8, part of a head rotated": of(
        Layout([(9, 33), (1, 63), (33, 33)], block_size=32), Heads(8, 1, 80, rotary=32)
    ),
    "no group, heads of 8": of(Layout([(5, 21), (1, 16)]), Heads(2, 2, 8)),
    "a window within a block": of(Layout([(1, 100), (30, 63), (1, 5), (1, 17)], spare=8), window=5),
    "a window across blocks": of(Layout([(1, 100), (50, 100), (40, 40)], spare=1), window=37),
    "rows that see nothing of a whole block of keys": of(Layout([(100, 120)]), Heads(1, 1), window=5),
    "a window in pieces": of(Layout([(1, 290), (1, 3)], decode_only=True), window=200),
    "a cap": of(Layout([(1, 63), (21, 40)]), softcap=2.0),
    "a cap, a window and pieces": of(
        Layout([(1, 200), (1, 63), (17, 150)]), Heads(4, 1, 96), softcap=5.0, window=140
    ),
    "sinks": of(Layout([(1, 1), (1, 40), (9, 30)], padding=1), Heads(8, 1, 64), sinks=True),
    "sinks, a cap and a window in pieces": of(
        Layout([(1, 290), (17, 150)]), Heads(4, 1, 32), softcap=5.0, window=200, sinks=True
    ),
    "one norm for all heads": of(Layout([(1, 17), (4, 4)], padding=1), Heads(norm="shared")),
    "a norm for every head": of(Layout([(1, 17), (4, 20)]), Heads(6, 2, 24, rotary=12, norm="own")),
    "heads of 512, whole and in pieces": of(
        Layout([(1, 140), (5, 20)], padding=1), Heads(2, 1, 512, norm="own")
    ),
    "a norm with an offset": of(Layout([(1, 17), (4, 20)]), Heads(3, 1, 256, norm="own", offset=1.0)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=pytest.mark.sweep if (place + turn) % 3 == 0 else ())
        for place, name in enumerate(CASES)
        for turn, dtype in enumerate(DTYPES)
    ],
)
def test_rows_attend_to_what_they_see_and_nothing_else_changes(
    name: str, dtype: torch.dtype, device: str
) -> None:
    """Outputs and new keys are as exact as the dtype allows, and the rest of the cache keeps its bits."""
    expect_right(CASES[name](dtype=dtype, device=device))


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["one chunk of every kind", "a cap, a window and pieces", "sinks", "a norm for every head"]
)
def test_a_cache_of_8_bits(
    name: str, dtype: torch.dtype, cache: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """New keys and values are rounded to nearest, values to torch's bits; rows attend to the rounded ones."""
    device = request.getfixturevalue("device" if cache is torch.int8 else "fp8_device")
    case = CASES[name](dtype=dtype, device=device, cache=cache)
    at, before = case.inputs, case.held
    out, after = case.run(), case.held
    assert errors(out, case.expected(*after)).max() <= TOLERANCE[dtype]
    heads = torch.cat([case.expected_qk, at.heads[:, at.num_heads + at.kv_heads :].double()], 1)[
        :, at.num_heads :
    ]
    step = 1.01 * (0.5 / 127 if cache is torch.int8 else 2**-4)
    before_it = 4 * torch.finfo(dtype).eps + 1e-5  # of the largest number
    for context in case.contexts:
        rows = case.cache_rows(context)[context.end - context.length :]
        exact = heads[context.row : context.row + context.length].transpose(0, 1)
        for was, now, part in zip(before, after, exact.split(at.kv_heads), strict=True):
            largest = part.abs().amax(-1, keepdim=True)
            rounded = step * (largest if cache is torch.int8 else part.abs())
            assert ((now[:, rows] - part).abs() <= rounded + before_it * largest).all()
            was[:, rows] = now[:, rows]
        own = at.heads[context.row : context.row + context.length, at.num_heads + at.kv_heads :]
        numbers, scales = narrowed(own.transpose(0, 1), cache)
        assert torch.equal(at.values[:, rows].view(torch.int8), numbers.view(torch.int8))
        assert at.scales is not None
        assert torch.equal(at.scales[1][:, rows], scales)
    for was, now in zip(before, after, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


LONG = {
    "one long context among short ones": partial(
        make_case, Layout(SKEWED, padding=2, spare=3, decode_only=True), Heads(6, 1, 80)
    ),
    "a short suffix of a long prefix": partial(
        make_case, Layout(PREFIX, padding=2), Heads(7, 1, 96), dtype=torch.float16
    ),
    "both, with a cap": partial(make_case, BOTH, Heads(6, 1, 16), softcap=4.0),
    "both, with a window of pieces": partial(make_case, BOTH, Heads(7, 1, 16), window=1000),
    "rows that see nothing of a piece": partial(
        make_case, Layout([(100, 1800)]), Heads(1, 1, 16), window=530, dtype=torch.float16
    ),
    "more of every context than its window": partial(
        make_case, Layout([(1, 4000), (40, 1100)]), Heads(2, 1, 16), window=200
    ),
    "rows that see nothing of a piece but their sinks": partial(
        make_case, Layout([(100, 1800)]), Heads(1, 1, 16), window=530, sinks=True
    ),
    "a tile that ends in a row of its own": partial(
        make_case, Layout([(33, 1200), (65, 2000)]), Heads(4, 1), dtype=torch.float16, sinks=True
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_long_contexts_are_cut_and_put_together(name: str, device: str) -> None:
    """Pieces of long contexts and prefixes give the result of the whole, in every batch."""
    case = LONG[name](device=device)
    assert case.tables.merges[:, 2].max() > 1
    expect_right(case)


def test_two_runs_give_the_same_bits(device: str) -> None:
    """Pieces are summed in a fixed order."""
    case = make_case(Layout([(1, 300), (5, 700)]), dtype=torch.float16, device=device)
    assert torch.equal(case.run(), case.run())


def test_a_context_that_is_not_cut_is_the_same_in_every_batch(device: str) -> None:
    """A context below the smallest piece has the same bits beside a long one as without it."""
    alone = make_case(Layout([(1, 100), (1, 4000)], decode_only=True), Heads(4, 1, 32), device=device)
    out = alone.run()
    beside = replace(alone, contexts=alone.contexts[:1])
    beside.tables.load(torch.from_numpy(pack_tables(alone.tables.capacity, beside.contexts)))
    assert torch.equal(beside.run()[0], out[0])


def test_offsets_beyond_32_bits(device: str) -> None:
    """Rows far out in a large cache are read and written where they are."""
    layout, heads = Layout([(1, 20), (3, 20)]), Heads(2, 1, 16)
    case = make_case(layout, heads, dtype=torch.float16, device=device)
    # Most of these 7.5 GB are never touched: rows are 2 ** 25 elements apart, values behind the keys.
    rows = case.inputs.keys.shape[1]
    storage = torch.empty(rows, 2**25, dtype=torch.float16, device=device)
    keys, values = storage[None, :, :16], storage[None, :, 16:32]
    case.inputs = replace(case.inputs, keys=keys, values=values)
    fill(case)
    assert max(int(case.cache_rows(context).max()) for context in case.contexts) * 2**25 > 2**31
    expect_right(case)
