"""Kernels that fuse the adapter updates do the same as expand, for every row of a step."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from inference_service.engine.kernels import sgmv
from inference_service.engine.kernels.attention import attend
from inference_service.engine.kernels.launch import Launch, intercepted
from inference_service.engine.kernels.rows import activated, gated
from tests.kernels.attention_case import Heads, Layout, make_case as attention_case
from tests.kernels.sgmv_case import Case, make_case
from tests.kernels.test_rows import poisoned

ROWS = 32
OWN_NORM = Heads(4, 2, 24, rotary=12, norm="own")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LONG = "tiles of prompts"
STEPS: dict[str, Sequence[int]] = {
    "base, adapters and padding": [-1, 2, 2, 0, 1, 1, -1],
    "more rows of one than a tile has": [0] * 20 + [1] * 5 + [-1] * 3,
    "no adapter": [-1] * 3,
    "no row of the base": [0, 1, 2, 0],
    LONG: [0] * 70 + [1] * 5 + [-1] * 3,
}


def step(
    slots: Sequence[int],
    ranks: Sequence[Sequence[int]],
    sizes: Sequence[int],
    rows: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[Case, sgmv.Update]:
    """Return a case behind shrink, and its update."""
    tile = sgmv.DECODE_TILE if rows <= ROWS else sgmv.PREFILL_TILE
    case = make_case(slots, ranks, 40, sizes, dtype=dtype, device=device, tile=tile, rows=rows)
    case.x.nan_to_num_()
    sgmv.shrink(case.x, case.group, case.segments, case.workspace)()
    behind = replace(case, out=torch.randn(rows, sum(sizes)).to(device, dtype))
    return behind, sgmv.update(case.group, case.segments, case.workspace)


def expanded(case: Case) -> torch.Tensor:
    out = case.out.clone()
    for launch in sgmv.expand(out, case.group, case.segments, case.workspace):
        launch()
    return out


def spread(launch: Launch) -> None:
    """Launch with more programs than runs of rows and heads, which share the rows, and with spoilt queries."""
    if "p_q" in launch.arguments and "eps" in launch.arguments:
        launch.arguments["p_q"].fill_(torch.nan)
    if "p_num_runs" in launch.arguments:
        launch = replace(launch, grid=(200,))
    launch.enqueue()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "halves"), [*((name, 2) for name in STEPS), (next(iter(STEPS)), 1)])
def test_gate_and_up_take_their_updates_on_the_way(
    name: str, halves: int, dtype: torch.dtype, device: str
) -> None:
    """The result is that of expand and the activation, for rows of adapters, of the base, and of padding."""
    slots, ranks = STEPS[name], [each[:halves] for each in ((16, 3), (0, 40), (5, 0))]
    rows = max(ROWS, len(slots) + 2)
    case, missing = step(slots, ranks, (72,) * halves, rows, dtype, device)
    activate = gated if halves == 2 else activated
    expected = activate(expanded(case), "silu")
    with intercepted(poisoned):
        found = activate(case.out, "silu", missing)
    torch.testing.assert_close(found, expected)
    base = np.setdiff1d(np.arange(rows), np.nonzero(np.array(slots) >= 0)[0])
    assert torch.equal(found[base], expected[base])


@pytest.mark.parametrize(
    ("name", "heads", "dtype"),
    [
        ("base, adapters and padding", OWN_NORM, torch.float32),
        ("more rows of one than a tile has", Heads(2, 1, 16), torch.float16),
        ("no adapter", Heads(4, 1, 16, norm="shared"), torch.bfloat16),
        ("no row of the base", OWN_NORM, torch.float32),
        (LONG, OWN_NORM, torch.float32),
    ],
)
def test_heads_take_their_updates_on_the_way(name: str, heads: Heads, dtype: torch.dtype, device: str) -> None:
    """Outputs and the cache are those of expand and the plain kernel; padding writes nothing."""
    slots, sizes = STEPS[name], [count * heads.dim for count in (heads.queries, heads.kv, heads.kv)]
    padding = max(ROWS, len(slots) + 2) - len(slots)
    layout = Layout([(1, 3 + i) for i in range(len(slots))], padding=padding, spare=padding, decode_only=True)
    at = attention_case(layout, heads, dtype=dtype, device=device)
    case, behind = step(slots, [(16, 3, 0), (0, 0, 40), (5, 0, 8)], sizes, len(at.inputs.heads), dtype, device)
    found = []
    for rows, missing in ((expanded(case), None), (case.out, behind)):
        keys, values = at.inputs.keys.clone(), at.inputs.values.clone()
        inputs = replace(at.inputs, heads=rows.view(len(rows), -1, heads.dim), keys=keys, values=values)
        with intercepted(spread):
            found.append((attend(inputs, at.tables, at.spec, at.norm, None, missing), keys, values))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, equal_nan=True)


@pytest.mark.parametrize("programs", [1, 5, 20])
def test_programs_share_any_number_of_tiles(programs: int, device: str) -> None:
    """The fewer programs there are, the wider are their tiles, and the results are the same."""
    slots, ranks = STEPS["base, adapters and padding"], [(16, 3), (0, 40), (5, 0)]
    case, missing = step(slots, ranks, (136, 136), 32, torch.float32, device)
    expected = expanded(case), gated(case.out, "silu", missing)
    with intercepted(lambda launch: replace(launch, grid=(programs,)).enqueue()):
        found = expanded(case), gated(case.out, "silu", missing)
    torch.testing.assert_close(found, expected)


def test_an_update_needs_all_rows_in_segments(device: str) -> None:
    """A capacity that leaves out rows of the base, or has several passes with them, is refused."""
    case = make_case(slots=[0], ranks=[(4,)], K=40, sizes=(16,), dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="in no segment"):
        sgmv.update(case.group, case.segments, case.workspace)
    with pytest.raises(ValueError, match="one pass"):
        sgmv.SegmentCapacity(8, 1, 16, passes=2, rows=4)


def test_every_row_is_in_one_run() -> None:
    """Segments of adapters are unchanged by base rows, which follow in tiles."""
    draw = np.random.default_rng(1)
    for rows in range(1, 33):
        plain, every = sgmv.SegmentCapacity(rows, 4, 4), sgmv.SegmentCapacity(rows, 4, 4, rows=rows)
        slots = draw.integers(-1, 4, draw.integers(0, rows + 1))
        alone, packed = (sgmv.pack_segments(capacity, slots) for capacity in (plain, every))
        old, new = (
            {name: array[where] for name, where in capacity.sections.items()}
            for capacity, array in ((plain, alone), (every, packed))
        )
        used, runs = int(old["pass_start"][-2]), int(new["num_runs"][0])
        assert runs <= every.runs == len(new["seg_slot"])
        assert new["pass_start"].tolist() == old["pass_start"].tolist()
        assert new["seg_slot"][:used].tolist() == old["seg_slot"][:used].tolist()
        assert (new["seg_slot"][used:runs] == -1).all()
        assert sorted(new["token_ids"][:rows]) == list(range(rows))
        starts = new["seg_start"][: runs + 1]
        assert set(np.diff(starts)) <= {1, 2, 3, 4}
        assert starts[-1] == rows
