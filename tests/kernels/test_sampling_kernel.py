"""The sampler's kernels: exact supports, exact draws, and none that depends on the rest of the batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from inference_service.engine.kernels.launch import planned
from inference_service.engine.kernels.sampling import (
    RowParams,
    SamplingTables,
    draw,
    pack_rows,
    reference,
    sample,
)
from inference_service.engine.kernels.sampling.host import philox
from inference_service.engine.kernels.sampling.launch import SHIFTS
from inference_service.engine.kernels.sampling.triton_kernels import _noise, _threshold
from tests.kernels.place import COMPILED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNTOUCHED = -7
GUARD = 16
MASS_ERROR = 1e-5
"""Relative error of a card's sums of probabilities: exponentials are approximate, and the order is another."""
FILTERED = [
    RowParams(0.7, top_k=5, seed=9, num_generated=3),
    RowParams(1.5, top_p=0.6, seed=-1),
    RowParams(1.0, min_p=0.1, seed=2**63 + 5),
    RowParams(2.0, top_k=20, top_p=0.5, min_p=0.01, seed=7, num_generated=2**20),
]


def guarded(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """Fresh random logits between columns that would win every race."""
    wide = torch.full((rows, vocab + GUARD), torch.inf)
    wide[:, :vocab] = torch.randn(rows, vocab) * 2
    return wide.to(device, dtype)[:, :vocab]


def tables_of(
    rows: Sequence[RowParams], vocab: int, device: str, capacity: int | None = None
) -> SamplingTables:
    tables = SamplingTables.allocate(capacity or len(rows), vocab, device)
    tables.load(torch.from_numpy(pack_rows(len(tables.rows), rows)))
    return tables


def drawn(logits: Tensor, rows: Sequence[RowParams]) -> list[int]:
    """Sample with as many padding rows as there are more logits than parameters."""
    ids = torch.full((len(logits),), UNTOUCHED, device=logits.device)
    sample(logits, tables_of(rows, logits.shape[1], str(logits.device), len(logits)), ids)
    return ids.tolist()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, on purpose
def test_what_is_no_number_never_wins(device: str) -> None:
    """NaN is as good as masked, and a row without anything else still gives a token."""
    logits = guarded(4, 63, torch.float32, device)
    logits[:2, ::2] = torch.nan
    logits[:2, 1::2] = -torch.inf
    logits[2:] = logits[:2]
    logits[:2, 41] = -50.0
    rows = [RowParams(), RowParams(1.0, top_k=3, top_p=0.9, min_p=0.1)]
    assert drawn(logits, rows * 2) == [41, 41, 0, 0]


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(1, torch.float32), (63, torch.float32), *((5000, dtype) for dtype in DTYPES)], ids=str
)
def test_the_host_draws_what_the_kernels_draw(vocab: int, dtype: torch.dtype, device: str) -> None:
    """The same token of the same logits for requests of all kinds, and both that of the reference."""
    kinds = [
        RowParams(),
        RowParams(1.0),
        RowParams(0.2),
        *FILTERED,
        RowParams(0.9, top_k=40, top_p=0.95),
        RowParams(1.0, top_k=40, min_p=0.3),
        RowParams(3.0, top_p=0.99),
        RowParams(1.0, top_p=1e-9),
    ]
    rows = [
        replace(kinds[index % len(kinds)], seed=index * 0x9E3779B97F4A7C15 - 2**63, num_generated=index)
        for index in range(14)
    ]
    logits = guarded(len(rows), vocab, dtype, device)
    logits[::4] = logits[::4].round()  # ties within and around every threshold
    logits[::5, ::3] = -torch.inf
    on_host = [draw(row.numpy(), params) for row, params in zip(logits.float().cpu(), rows, strict=True)]
    assert on_host == reference.sample(logits.cpu(), rows).tolist()
    assert on_host == drawn(logits, rows)


@triton.jit
def threshold_kernel(
    p_logits, p_rows, p_best, p_out, V, stride, SHIFT: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Store (low, high, taken) of each row."""
    i_n = tl.program_id(0)
    p_params = p_rows + i_n * 8
    best = tl.load(p_best + i_n)
    sharpness = tl.load(p_params + 1).to(tl.float32, bitcast=True)
    floor = best - tl.load(p_params + 4).to(tl.float32, bitcast=True)
    low, high, taken = _threshold(
        p_logits + i_n * stride, p_params, V, best, floor, sharpness, SHIFT, LINES, BLOCK
    )
    tl.store(p_out + 3 * i_n, low)
    tl.store(p_out + 3 * i_n + 1, high)
    tl.store(p_out + 3 * i_n + 2, taken)


def supports(logits: Tensor, rows: Sequence[RowParams]) -> list[list[int]]:
    """The tokens of each row that the kernel's threshold lets pass."""
    best = logits.float().amax(dim=1)
    found = torch.full((len(rows), 3), UNTOUCHED, dtype=torch.int32, device=logits.device)
    packed = torch.from_numpy(pack_rows(len(rows), rows)).to(logits.device)
    shift, vocab = SHIFTS[logits.dtype], logits.shape[1]
    threshold_kernel[(len(rows),)](logits, packed, best, found, vocab, logits.stride(0), shift, 2, 1024)
    span = packed.view(torch.float32)[:, 4]
    retained = []
    for row, top, width, (low, high, taken) in zip(
        logits.float().cpu(), best, span, found.tolist(), strict=True
    ):
        bits = row.where(row != 0, 0.0).view(torch.int32)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> shift
        valid = (row > -torch.inf) & (row >= (top - width).cpu())
        last = valid & (key > low) & (key <= high)
        retained.append(((valid & (key > high)) | (last & (last.cumsum(0) <= taken))).nonzero()[:, 0].tolist())
    return retained


@pytest.mark.parametrize(
    ("vocab", "dtype", "grain"),
    [
        (63, torch.float32, 1.0),
        (63, torch.bfloat16, 0.0),
        (3000, torch.float32, 0.0),
        (3000, torch.float32, 1.0),
        (3000, torch.float16, 0.0),
        (3000, torch.bfloat16, 0.0),
    ],
    ids=str,
)
def test_supports_are_those_of_sorting(vocab: int, dtype: torch.dtype, grain: float, device: str) -> None:
    """The sampler applies min-p, then top-k, then top-p of the rest; of equal tokens the lower comes first."""
    rows = [
        *FILTERED,
        RowParams(1.0, top_k=1, top_p=0.0),
        RowParams(1.0, top_p=1e-9),
        RowParams(0.8, top_k=vocab - 1, top_p=0.95),
        RowParams(1.0, top_k=40, min_p=0.3),
        RowParams(1.0, top_k=vocab + 5),
        RowParams(3.0, top_p=0.99),
    ]
    logits = guarded(len(rows), vocab, dtype, device)
    if grain:  # ties within and around every threshold
        logits.div_(grain).round_().mul_(grain)
    logits[-1, ::3] = -torch.inf
    least, expected, most = (
        [
            set(
                reference.distribution(row, replace(params, top_p=params.top_p * share))
                .nonzero()[:, 0]
                .tolist()
            )
            for row, params in zip(logits.cpu(), rows, strict=True)
        ]
        for share in (1 - MASS_ERROR, 1.0, 1 + MASS_ERROR)
    )
    for found in (least, expected, most):  # top-p 0 leaves nothing to sort; a draw needs something
        found[4] = {int(logits[4].cpu().argmax())}
    for support, within, right, beyond in zip(supports(logits, rows), least, expected, most, strict=True):
        assert within <= {*support} <= beyond
        assert COMPILED or {*support} == right
    assert sum(within == beyond for within, beyond in zip(least, most, strict=True)) > len(rows) // 2
    assert len({len(support) for support in expected}) > 4


def test_equal_logits_are_taken_from_the_lowest_token(device: str) -> None:
    """A row of one value has as many tokens as top-k or top-p ask for, both zeros being equal."""
    logits = torch.zeros(3, 1000, device=device)
    logits[:, ::2] = -0.0
    rows = [RowParams(1.0, top_k=7), RowParams(1.0, top_p=0.5), RowParams(1.0, top_k=100, top_p=0.255)]
    assert supports(logits, rows) == [[*range(7)], [*range(500)], [*range(26)]]


def test_equal_logits_are_counted_over_tiles(device: str) -> None:
    """The last race lets pass just as many of equal tokens as there is room for, at any end of a tile."""
    rows = [RowParams(1.0, top_k=top_k, seed=seed) for top_k in (2, 1030) for seed in range(4)]
    logits = torch.zeros(len(rows), 3000, device=device)
    assert drawn(logits, rows) == reference.sample(logits.cpu(), rows).tolist()


def test_the_reference_counts_as_philox_does() -> None:
    """Random123's known answers for Philox-4x32-10, of all zeros and of all ones."""
    for word, answer in {
        0: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        2**32 - 1: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }.items():
        words = philox([np.array([word], dtype=np.uint64)] * 4, (word, word))
        assert tuple(int(found[0]) for found in words) == answer


@triton.jit
def noise_kernel(p_rows, p_out, first, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i_n = tl.program_id(0)
    tl.store(p_out + i_n * BLOCK + tl.arange(0, BLOCK), _noise(p_rows + i_n * 8, first, BLOCK))


def noises(rows: Sequence[RowParams], first: int, block: int, device: str) -> Tensor:
    """[rows, block]: the kernel's noise."""
    out = torch.full((len(rows), block), torch.nan, device=device)
    noise_kernel[(len(rows),)](torch.from_numpy(pack_rows(len(rows), rows)).to(device), out, first, block)
    return out.cpu()


def test_noise_is_that_of_the_reference(device: str) -> None:
    """A function of the seed, the number of tokens and the token: all digits, also in the tails."""
    rows = [RowParams(1.0, seed=seed, num_generated=n) for seed in (0, -5, 2**40) for n in (0, 77)]
    found = noises(rows, 4096, 4096, device)
    expected = np.stack([reference.noise(row, 8192)[4096:] for row in rows])
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert len(found.unique()) > 0.9 * found.numel()


def test_a_captured_launch_serves_later_batches(device: str) -> None:
    """Made with empty tables, launches draw for whatever rows are loaded later, and only for those."""
    logits = guarded(3, 1000, torch.bfloat16, device)
    tables = SamplingTables.allocate(4, 1000, device)
    ids = torch.full((3,), UNTOUCHED, device=device)
    _, graph = planned(sample, logits, tables, ids)
    seen = []
    for rows in ([], [RowParams(), FILTERED[0]], [FILTERED[1], RowParams(), RowParams(1.0)]):
        logits.copy_(torch.randn(3, 1000))
        ids.fill_(UNTOUCHED)
        tables.load(torch.from_numpy(pack_rows(4, rows)))
        tables.scores.fill_(torch.nan)
        for launch in graph:
            launch()
        seen.append(ids.tolist() == [*reference.sample(logits.cpu(), rows), *[UNTOUCHED] * (3 - len(rows))])
    assert seen == [True] * 3


LOGITS, IDS = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64)
REFUSALS: dict[str, Callable[[SamplingTables], object]] = {
    "logits must have 64 columns, got 63": lambda tables: sample(LOGITS[:, 1:], tables, IDS),
    "logits must be contiguous in its last": lambda tables: sample(LOGITS.T.contiguous().T, tables, IDS),
    "the same rows, got 2 and 1": lambda tables: sample(LOGITS, tables, IDS[1:]),
    "3 rows, but tables for 2": lambda tables: sample(
        torch.zeros(3, 64), tables, torch.zeros(3, dtype=torch.int64)
    ),
    "ids must be int32 or int64": lambda tables: sample(LOGITS, tables, IDS.float()),
    "compute in": lambda tables: sample(LOGITS.double(), tables, IDS),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(message: str) -> None:
    """A ValueError names the tensor, the expected shape or type, and the actual one."""
    if COMPILED:
        pytest.skip("the tensors are on the CPU")
    with pytest.raises(ValueError, match=message):
        REFUSALS[message](SamplingTables.allocate(2, 64, "cpu"))
