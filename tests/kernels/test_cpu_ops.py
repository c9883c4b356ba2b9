"""The compiled CPU operations against float64, over odd shapes, with outputs and unread memory poisoned."""

import ctypes
import math
from array import array
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference_service.core.constraint import packed
from inference_service.engine.kernels.cpu.compiling import (
    Kind,
    kinds_that_run,
)
from inference_service.engine.kernels.cpu.ops import (
    ADAPTER_FIELDS,
    BLOCK,
    FEW_ROWS,
    NEVER,
    NOT_TIMED,
    Chunks,
    CpuOps,
    Table,
    adapters_of,
)
from inference_service.engine.kernels.rows import Activation
from inference_service.engine.kernels.rows.reference import ACTIVATIONS
from inference_service.engine.kernels.sampling import Edits, RowParams, draw_rows

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.bfloat16]
V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = "avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def ops(library: ctypes.CDLL, request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(library, request.param)


def packed_by(ops: CpuOps, matrix: Tensor, kind: int) -> Tensor:
    """Return a matrix as `CpuOps.pack` lays it out: 0 for A, 1 for B."""
    rows, columns = matrix.shape
    if kind == 0:
        lane = 16 * ops.units
        packed = torch.full((rows, -(-columns // lane) * lane), torch.nan, dtype=ops.dtype)
    else:
        shape = -(-columns // 16), -(-rows // ops.units), 16, ops.units
        packed = torch.full(shape, torch.nan, dtype=ops.dtype)
    piece = (matrix.data_ptr(), *matrix.stride(), rows, columns, kind, packed.data_ptr())
    ops.pack(Table(np.array([piece], dtype=np.int64)))
    return packed


def test_packing_puts_every_value_where_the_products_read_it(ops: CpuOps) -> None:
    """Packing takes rows, columns and steps of two, and fills the padding with zeros."""
    for rank, columns in product([1, 2, 5, 16], [1, 16, 33, 96]):
        matrix = torch.randn(rank, columns).to(ops.dtype)
        steps = torch.zeros(2 * rank, 2 * columns, dtype=ops.dtype)[::2, ::2].copy_(matrix)
        lane, units = 16 * ops.units, ops.units
        a = torch.nn.functional.pad(matrix, (0, -columns % lane))
        tiles = torch.nn.functional.pad(matrix, (0, -columns % 16, 0, -rank % units))
        b = tiles.view(len(tiles) // units, units, -1, 16).permute(2, 0, 3, 1)
        for provided in (matrix, matrix.t().contiguous().t(), steps):
            assert torch.equal(packed_by(ops, provided, 0), a), (rank, columns)
            assert torch.equal(packed_by(ops, provided, 1), b), (rank, columns)


def _assert_close(found: Tensor, expected: Tensor, ops: CpuOps, case: object = "", times: int = 1) -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < times * TOLERANCE[ops.dtype], case


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("K", "outs"), [(63, (48,)), (576, (576, 192, 192)), (100, (33, 1)), (1000, (512, 40))]
)
def test_lora_adds_each_adapter_to_its_own_rows(ops: CpuOps, K: int, outs: tuple[int, ...]) -> None:
    """Mixed ranks, slices, vectors, segments of 1 to 70 rows, subnormals; rows of the base keep every bit."""
    dtype = ops.dtype
    ranks = [[(8, 16, 5)[i % 3] for i in range(len(outs))], [64, 0, 3][: len(outs)], [1] * len(outs)]
    lengths = [(0, 3), (1, 70), (2, 1), (0, 33), (1, 4)]
    rows = 5 + sum(length for _, length in lengths)
    x, out = torch.randn(rows, K).to(dtype), torch.randn(rows, sum(outs)).to(dtype)
    x[9:12], out[9:12] = torch.ldexp(x[9:12].float(), torch.tensor(-125)), 0
    before, expected = out.clone(), out.double()
    table = np.zeros((len(ranks), ADAPTER_FIELDS), dtype=np.int64)
    alive, matrices = [], []
    vectors = {
        (slot, index): torch.randn(2, -(-outs[index] // 16) * 16)
        for slot, index in ((0, 0), (1, 1))
        if index < len(outs)
    }
    for slot, own in enumerate(ranks):
        a = [torch.randn(rank, K).to(dtype) / K**0.5 for rank in own]
        b = [torch.randn(rank, out_s).to(dtype) for rank, out_s in zip(own, outs, strict=True)]
        packed = [packed_by(ops, torch.cat(a), 0), *(packed_by(ops, part, 1) for part in b)]
        alive += packed
        matrices.append((a, b))
        fields = [packed[0].data_ptr(), sum(own), len(own)]
        for index, rank in enumerate(own):
            own_vectors = vectors.get((slot, index))
            address = 0 if own_vectors is None else own_vectors.data_ptr()
            fields += [rank, packed[1 + index].data_ptr(), sum(outs[:index]), outs[index], address]
        table[slot, : len(fields)] = fields
    segments, start = [], 5
    for slot, length in lengths:
        segments.append((slot, start, length))
        a, b = matrices[slot]
        for index, out_s in enumerate(outs):
            column = sum(outs[:index])
            update = x[start : start + length].double() @ a[index].double().t() @ b[index].double()
            own_rows = expected[start : start + length, column : column + out_s]
            own_rows += update
            if (slot, index) in vectors:
                c, d = vectors[slot, index][:, :out_s].double()
                own_rows.copy_(own_rows * c + d)
        start += length
    workspace = torch.full((rows, max(map(sum, ranks))), torch.nan)
    beside = np.full((len(ranks), 3, ADAPTER_FIELDS), -1, dtype=np.int64)  # other linears' fields
    beside[:, 1] = table
    adapters = Table(beside)
    address = adapters.address + ADAPTER_FIELDS * 8
    here = adapters_of(address, Table(np.array(segments, dtype=np.int64)), workspace, apart=3)
    ops.lora(x, out, here)
    assert torch.equal(out[:5].view(torch.uint8), before[:5].view(torch.uint8))
    _assert_close(out[5:] - before[5:], expected[5:] - before[5:].double(), ops, times=3)
    for start in (1, NEVER) if ops.widened_from.value > 1 else ():
        ops.widened_from.value, again = start, before.clone()
        ops.lora(x, again, here)
        assert torch.equal(again, out)


def test_a_linear_multiplies(ops: CpuOps) -> None:
    """Rows and columns that fill no tile, sums that are kept between blocks of K, rows that stand apart."""
    shapes = [(1, 2, 1), (3, 40, 17), (9, 576, 200), (70, 34, 48), (130, 4400, 20)]
    for (rows, width, columns), biased in product(shapes, (True, False)):
        apart = torch.full((rows, width + 3), torch.nan, dtype=ops.dtype)[:, :width]
        x, weight = apart.copy_(torch.randn(rows, width)), torch.randn(columns, width).to(ops.dtype)
        bias = torch.randn(columns).to(ops.dtype) if biased else None
        tiled = ops.tiled(weight, bias)
        expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        _assert_close(ops.linear(x, tiled), expected, ops, (rows, width, columns, biased))


@pytest.mark.parametrize("kind", kinds_that_run(), ids=lambda kind: kind.name)
def test_bfloat16_has_the_bits_of_float32_sums_in_order(beforehand: Path, kind: Kind) -> None:
    """A product of two values is exact in float32, and each sum is rounded once, the second of two first.

    So it is for any number of rows, widened or not; subnormals are the same zeros for both.
    """
    (path,) = beforehand.glob(f"ops-{kind.name}-*.so")
    ops = CpuOps(ctypes.CDLL(str(path)), torch.bfloat16)
    x, weight = torch.randn(70, 2050).bfloat16(), torch.randn(49, 2050).bfloat16()
    tiny = torch.ldexp(x[:9].float(), torch.tensor(-125)).bfloat16()
    expected = torch.zeros(70, 49)
    for k in range(2050):
        expected += x[:, k ^ 1, None].float() * weight[:, k ^ 1].float()
    found = []
    for start in (1, NEVER) if "avx512_bf16" in kind.needs else (1,):
        ops.widened_from.value = start
        tiled, compact = ops.tiled(weight), ops.compact(weight[:, :2048])
        for rows in (1, 5, 8, 9, 70):
            assert torch.equal(ops.linear(x[:rows], tiled), expected[:rows].bfloat16())
        of_compact = [] if compact is None else [ops.linear(x[:, :2048], compact)]
        found.append(torch.cat([ops.linear(tiny, tiled), *of_compact]))
    assert torch.equal(found[0], found[-1])


@pytest.mark.parametrize(("widened", "pairs", "start"), [(10, 20, FEW_ROWS), (20, 10, NEVER), (19, 20, NEVER)])
def test_many_rows_of_bfloat16_are_widened_where_that_is_faster(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, widened: int, pairs: int, start: int
) -> None:
    """Both ways are measured, as processors differ; a processor that has but one way takes it."""
    now, usual = [0], CpuOps(library, torch.bfloat16)

    def linear(ops: CpuOps, *_: Any) -> None:
        now[0] += widened if ops.widened_from.value == 1 else pairs

    two_ways = "bfloat16" in usual.instructions
    usual.widened_from.value = NOT_TIMED if two_ways else 1
    monkeypatch.setattr(CpuOps, "linear", linear)
    monkeypatch.setattr("inference_service.engine.kernels.cpu.ops.perf_counter", lambda: now[0])
    chosen = CpuOps(library, torch.bfloat16).widened_from.value
    assert chosen == (start if two_ways else 1)


def test_compact_weights_have_the_bits_of_whole_ones(library: ctypes.CDLL) -> None:
    """Compact weights have the bits of whole ones for shared decodes, blocks of K, padding, and any value."""
    ops = CpuOps(library, torch.bfloat16)
    if not ops.compacts:
        pytest.skip("this kind has whole weights alone")
    odd = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e9, 1e-30]).bfloat16()
    for width, columns, own in product((8, 576, 4400), (1, 96, 200), (False, True)):
        x, magnitudes = torch.randn(130, width).bfloat16(), torch.randint(-9, 6, (columns, width))
        weight = torch.ldexp(1 + torch.rand(columns, width), magnitudes).bfloat16()
        if own:
            few = torch.randperm(weight.numel())[: weight.numel() // 600]
            weight.view(-1)[few] = odd[torch.randint(len(odd), few.shape)]
            weight.view(-1)[few[:3]] = torch.tensor([math.inf, -math.inf, math.nan]).bfloat16()[: len(few)]
        bias = torch.randn(columns).bfloat16() if own else None
        whole, compact = ops.tiled(weight, bias), ops.compact(weight, bias)
        assert compact.num_bytes < 0.79 * whole.num_bytes + 200
        for rows in (1, 3, 8, 9, 64, 65, 130):
            found, expected = ops.linear(x[:rows], compact), ops.linear(x[:rows], whole)
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), (width, columns, own, rows)
    spread = torch.randint(-(2**15), 2**15, (96, 64), dtype=torch.int16).view(torch.bfloat16)
    assert ops.compact(spread) is None  # too many upper bytes for the table


def test_a_width_that_is_no_whole_unit_is_left_to_others(library: ctypes.CDLL) -> None:
    """An odd width of bfloat16 is left to torch, as the product takes two values at once."""
    assert CpuOps(library, torch.bfloat16).tiled(torch.ones(4, 3)) is None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_a_row_of_a_linear_and_its_adapters_depends_on_no_other(
    ops: CpuOps,
) -> None:
    """A row has the same bits in one call and in two, alone and beside others, also without an adapter."""
    x, weight, a, b = (
        torch.randn(*shape).to(ops.dtype) for shape in ((75, 1000), (150, 1000), (13, 1000), (13, 150))
    )
    tiled, packed = ops.tiled(weight), (packed_by(ops, a, 0), packed_by(ops, b, 1))
    assert tiled is not None
    fields = [packed[0].data_ptr(), 13, 1, 13, packed[1].data_ptr(), 0, 150, *[0] * 12]
    table = Table(np.array([fields], dtype=np.int64))

    def made(x: Tensor, first: int, at_once: bool) -> Tensor:
        segments = Table(np.array([[0, first, len(x) - first]], dtype=np.int64))
        workspace = torch.full((len(x), 13), torch.nan)
        adapters = adapters_of(table.address, segments, workspace)
        if at_once:
            return ops.linear(x, tiled, adapters)
        out = ops.linear(x, tiled)
        ops.lora(x, out, adapters)
        return out

    together = made(x, 5, True)
    assert torch.equal(made(x, 5, False), together)
    for at_once in (True, False):
        for row in (5, 6, 20, 44, 74):
            assert torch.equal(made(x[row : row + 1], 0, at_once), together[row : row + 1])
        assert torch.equal(torch.cat([made(rows, 0, at_once) for rows in torch.split(x[5:], 6)]), together[5:])
    assert torch.equal(ops.linear(x[:5], tiled), together[:5])


@pytest.mark.parametrize(("heads", "kv", "dim"), [(9, 3, 64), (6, 2, 8), (4, 4, 80), (8, 1, 256)])
def test_attention_over_a_paged_cache(ops: CpuOps, heads: int, kv: int, dim: int) -> None:
    """Decode rows and chunks of prompts in one call, written through rope, over blocks between NaN."""
    for window, softcap, sunk in [(0, 0.0, False), (24, 0.0, True), (0, 5.0, True), (-24, 0.0, False)]:
        _check_attention(ops, heads, kv, dim, window, softcap, sunk)


def _check_attention(
    ops: CpuOps, heads: int, kv: int, dim: int, window: int, softcap: float, sunk: bool
) -> None:
    dtype = ops.dtype
    shapes = [(1, 1), (1, 37), (20, 20), (7, 90), (1, 160)]  # rows of the chunk, context length
    keys, values = ops.new_cache(kv, 64 * BLOCK, dim)
    keys.fill_(torch.nan)
    values.fill_(torch.nan)
    order = torch.randperm(64).tolist()
    contexts, queries, expected, row = [], [], [], 0
    sinks = torch.randn(heads) * 3 if sunk else None
    for length, end in shapes:
        blocks = [order.pop() for _ in range(-(-end // BLOCK))]
        q, k, v = (torch.randn(end, n, dim).to(dtype) for n in (heads, kv, kv))
        cos, sin = torch.ones(end, dim), torch.zeros(end, dim)
        cache_rows = torch.tensor([blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(end)])
        fused = torch.cat([part.reshape(end, -1) for part in (q, k, v)], dim=1)
        parts = [
            part.view(end, -1, dim) for part in torch.split(fused, [heads * dim, kv * dim, kv * dim], dim=1)
        ]
        ops.rope_write(parts[0], parts[1], parts[2], cos, sin, cache_rows, keys, values)
        contexts.append((row, length, end, blocks))
        queries.append(q[end - length :])
        expected.append(_attend(q[end - length :], k, v, window, softcap, sinks))
        row += length
    query = torch.cat(queries)
    chunks = Chunks.make(contexts)
    found = ops.attention(query, chunks, keys, values, heads // kv, dim**-0.5, softcap, window, sinks)
    _assert_close(found, torch.cat(expected), ops, (window, softcap, sunk))


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, sinks: Tensor | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    keys, values = (part.double().repeat_interleave(group, dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * q.shape[2] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(k) - len(q), len(k))[:, None]
    seen = torch.arange(len(k))[None, :]
    hidden = (seen > at) | (seen < (at // -window * -window if window < 0 else at - (window or len(k)) + 1))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, values).reshape(len(q), -1)


@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32)])
def test_rope_turns_the_halves_against_each_other(ops: CpuOps, dim: int, rotary: int) -> None:
    """Rotary embedding rotates pairs (i, i + rotary / 2), and leaves the columns behind rotary."""
    rows, heads, kv = 11, 4, 2
    fused = torch.randn(rows, (heads + 2 * kv) * dim).to(ops.dtype)
    q, k, v = (
        part.view(rows, -1, dim) for part in torch.split(fused, [heads * dim, kv * dim, kv * dim], dim=1)
    )
    angles = torch.rand(rows, rotary // 2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=1) for f in (torch.cos, torch.sin))
    sin[:, : rotary // 2] *= -1
    whole = fused.clone().double()[:, : heads * dim].view(rows, heads, dim)
    low, high = whole[..., : rotary // 2], whole[..., rotary // 2 : rotary]
    c, s = cos[:, None, : rotary // 2].double(), -sin[:, None, : rotary // 2].double()
    expected = torch.cat([low * c - high * s, high * c + low * s, whole[..., rotary:]], dim=-1)
    keys, values = ops.new_cache(kv, 2 * BLOCK, dim)
    ops.rope_write(q, k, v, cos, sin, torch.arange(rows), keys, values)
    _assert_close(q, expected, ops)


def test_norm_adds_and_normalises(ops: CpuOps) -> None:
    """The sum is left in hidden, rounded to its type, and the norm is of that sum."""
    for width, rows in product([576, 100, 7], [1, 33]):
        hidden, delta = (torch.randn(rows, width).to(ops.dtype) for _ in range(2))
        weight = torch.randn(width).to(ops.dtype)
        total = hidden + delta
        expected = total.double() * torch.rsqrt(total.double().pow(2).mean(-1, keepdim=True) + 1e-5)
        out = ops.rms_norm(hidden, delta, weight, 1e-5, offset=1.0)
        assert torch.equal(hidden, total)
        _assert_close(out, expected * (1 + weight.double()), ops, (width, rows))
        again = ops.rms_norm(hidden, None, weight, 1e-5)
        assert torch.equal(hidden, total)
        _assert_close(again, expected * weight.double(), ops, (width, rows))


def test_heads_are_normed_in_place(ops: CpuOps) -> None:
    """Heads of queries and keys have separate weights; heads of values are not changed."""
    heads, weight = torch.randn(19, 7, 24).to(ops.dtype), torch.randn(5, 24).to(ops.dtype)
    expected = heads.double()
    expected[:, :5] = torch.nn.functional.rms_norm(expected[:, :5], (24,), None, 1e-5) * (1 + weight.double())
    ops.norm_heads(heads, weight, 1e-5, offset=1.0)
    _assert_close(heads, expected, ops)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops: CpuOps, activation: Activation) -> None:
    """An activation, of a gate or alone, is exact far out on either side, too."""
    for width in (1536, 50):
        gate_up = torch.randn(9, 2 * width).to(ops.dtype) * 3
        gate_up[0, :4] = torch.tensor([200.0, -200.0, 0.0, 88.0])
        gate, up = ACTIVATIONS[activation](gate_up.double()).chunk(2, dim=1)
        _assert_close(ops.activated(gate_up, activation), torch.cat([gate, up], dim=1), ops, width)
        expected = gate * gate_up[:, width:].double()
        _assert_close(ops.activated(gate_up, activation, gated=True), expected, ops, width)


def test_layer_norms_and_sums(ops: CpuOps) -> None:
    """Rows beside zero keep their variance; a norm without biases and a factor without a sum are served."""
    for rows, width, biased in product((2, 33), (48, 50), (True, False)):
        hidden, delta = ((torch.randn(rows, width) + 3).to(ops.dtype) for _ in range(2))
        weight, bias = (torch.randn(width).to(ops.dtype) for _ in range(2))
        total, before = hidden + delta, hidden.clone()
        found = ops.layer_norm(hidden, delta, weight, bias if biased else None, 1e-5)
        assert torch.equal(hidden, total)
        added = bias.double() if biased else None
        expected = torch.nn.functional.layer_norm(total.double(), (width,), weight.double(), added, 1e-5)
        _assert_close(found, expected, ops, (rows, width, biased))
        assert torch.equal(ops.add(before, delta), total)
        _assert_close(ops.add(total.clone(), None, 0.3), 0.3 * total.double(), ops)


@pytest.mark.parametrize(
    ("window", "softcap", "sunk", "group"), [(0, 0.0, False, 3), (24, 0.0, True, 1), (100, 5.0, False, 3)]
)
def test_what_a_row_attends_to_does_not_depend_on_the_others(
    ops: CpuOps, window: int, softcap: float, sunk: bool, group: int
) -> None:
    """Bit for bit: every row of a prompt of 150, in one chunk, in chunks of 7, and alone."""
    dtype = ops.dtype
    kv, dim, rows = 2, 40, 150
    keys, values = ops.new_cache(kv, 10 * BLOCK, dim)
    parts = [torch.randn(rows, heads, dim).to(dtype) for heads in (kv * group, kv, kv)]
    fused = torch.cat(parts, dim=1)
    q, k, v = torch.split(fused, [kv * group, kv, kv], dim=1)
    sinks = torch.randn(kv * group) if sunk else None
    ops.rope_write(q, k, v, torch.ones(rows, dim), torch.zeros(rows, dim), torch.arange(rows), keys, values)

    def attended(length: int) -> Tensor:
        starts = range(0, rows, length)
        contexts = [
            (start, min(length, rows - start), min(start + length, rows), [*range(10)]) for start in starts
        ]
        chunks = Chunks.make(contexts)
        return ops.attention(q, chunks, keys, values, group, dim**-0.5, softcap, window, sinks)

    whole = attended(rows)
    for length in (1, 7, 64):
        assert torch.equal(attended(length), whole)
    for start in (1, NEVER) if ops.widened_from.value > 1 else ():
        ops.widened_from.value = start
        assert torch.equal(attended(rows), whole)


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("fpu sse2 avx", []),
        (V3, ["avx2"]),
        (f"{V3} {V4}", ["avx512", "avx2"]),
        (f"{V3} {V4} avx512_vnni", ["avx512vnni", "avx512", "avx2"]),
        (f"{V3} {V4} avx512_bf16 avx512_vnni", ["avx512bf16", "avx512vnni", "avx512", "avx2"]),
        (f"{V3} avx512f avx512_bf16", ["avx2"]),  # as a virtual machine may cut it
    ],
)
def test_a_processor_gets_what_it_can_run(
    flags: str, kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations use only instructions of the processor, as another would end the process."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert [kind.name for kind in kinds_that_run(cpuinfo)] == kinds
    assert kinds_that_run(tmp_path / "none") == []


def edits_of(row: int, vocab: int) -> Edits:
    """Return penalties of some tokens, and additions to some, of which -inf takes one out."""
    some = np.random.default_rng(row)
    seen = array("i", some.permutation(vocab)[: vocab // 3].tolist())
    counts = array("f", some.integers(0, 3, len(seen)).tolist())
    added_to = array("i", [*range(0, vocab, 3), row % vocab])
    added = array("f", [*some.normal(0, 9, len(added_to) - 1).tolist(), -math.inf])
    return Edits(seen, counts, 1.3, 0.4, 0.2, added_to, added)


@cache
def rows_of(vocab: int) -> list[RowParams]:
    """Return rows of every kind of draw."""
    nearly_all = 1 - 2**-53
    filters = (0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.9, 0.0), (0, nearly_all, 0.0), (40, 0.5, 0.05), (0, 1e-9, 1.0)
    chosen = product((0.0, 0.01, 0.7, 50.0), (*filters, (1500, 1.0, 0.0)))
    rows = [
        RowParams(temperature, top_k, top_p, min_p, row - 2**63, row, allowed, edits)
        for row, (temperature, (top_k, top_p, min_p)) in enumerate(chosen)
        for allowed in (None, packed(np.random.default_rng(row).random(vocab) < 0.3))
        for edits in (None, edits_of(row, vocab))
    ]
    return rows + [RowParams(heat, allowed=allowed) for heat in (0.0, 1.0) for allowed in (b"\0", b"\1")]


def logits_for(count: int, vocab: int, dtype: torch.dtype, spread: float) -> Tensor:
    """Return logits with ties, tokens that are out, and NaN; the same at every call."""
    random = torch.randn(count, 2 * vocab, generator=torch.Generator().manual_seed(0))
    logits = (random * spread).to(dtype)[:, :vocab]
    logits[1::3] = (logits[1::3] * 2).round() / 2
    logits[2::5, ::3] = -torch.inf
    logits[7] = -torch.inf
    logits[8::9, vocab // 2] = torch.nan
    return logits


@cache
def drawn_by_the_host(vocab: int, dtype: torch.dtype, spread: float) -> tuple[list[int], list[float]]:
    """Return what every library must draw, which takes longer than they do."""
    rows = rows_of(vocab)
    return draw_rows(logits_for(len(rows), vocab, dtype, spread), rows)


@pytest.mark.parametrize("vocab", [1, 15, 64, 700, 20003])
def test_a_row_is_drawn_as_the_host_draws_it(ops: CpuOps, vocab: int) -> None:
    """Every kind of draw, with ties, edits, masks, tokens that are out, NaN: the same token in any batch."""
    rows = rows_of(vocab)
    for spread in (0.0, 1.0, 8.0):
        logits = logits_for(len(rows), vocab, ops.dtype, spread)
        ids, tops = ops.draw(logits, rows)
        expected, best = drawn_by_the_host(vocab, ops.dtype, spread)
        usual = [row for row, top in enumerate(best) if top == top]
        assert [ids[row] for row in usual] == [expected[row] for row in usual]
        np.testing.assert_array_equal(tops, best)
        for row in range(0, len(rows), 7):
            few = slice(row, row + 1 + row % 5)
            assert ops.draw(logits[few], rows[few])[0] == ids[few]


@pytest.mark.parametrize("vocab", [1, 15, 64, 5003])
def test_log_probabilities_are_those_of_float64(ops: CpuOps, vocab: int) -> None:
    """To the last bit but one, with ties, tokens that may not come, and NaN: the same in any batch."""
    ids = torch.arange(12) * 7 % vocab
    for spread, count in product((0.0, 1.0, 30.0), {0, min(5, vocab), min(20, vocab)}):
        logits = (torch.randn(len(ids), 2 * vocab) * spread).to(ops.dtype)[:, :vocab]
        logits[1::3] = logits[1::3].round()
        logits[2, 1::3] = -torch.inf
        logits[3, vocab // 2] = torch.nan
        every = torch.log_softmax(logits.double(), dim=-1)
        own = every.gather(1, ids[:, None])
        found = ops.scores(logits, ids, count)
        close = {"rtol": 2**-23, "atol": 1e-12, "equal_nan": True}
        torch.testing.assert_close(found[1].double(), own[:, 0], **close)
        best = every.sort(dim=-1, descending=True, stable=True)
        finite = [row for row in range(len(ids)) if row != 3]
        assert torch.equal(found[2][finite], (every > own).sum(dim=-1)[finite] + 1)
        assert torch.equal(found[3][finite], best.indices[finite, :count])
        torch.testing.assert_close(found[4].double(), best.values[:, :count], **close)
        for row in range(len(ids)):
            alone = ops.scores(logits[row:], ids[row : row + 1], count)
            torch.testing.assert_close(
                [part[0] for part in alone], [part[row] for part in found], rtol=0, atol=0, equal_nan=True
            )
