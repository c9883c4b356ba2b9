"""Weights of 8 and 4 bits: rounding, and their products, widened in registers too."""

from ctypes import CDLL

import pytest
import torch
from torch import Tensor

from inference_service.engine.backends.native import NativeLinear, NativeOperations
from inference_service.engine.backends.triton import TritonOperations
from inference_service.engine.kernels.cpu.ops import ROUNDED, CpuOps
from inference_service.engine.kernels.integers import Quantized, quantize
from inference_service.engine.kernels.launch import planned
from inference_service.engine.kernels.rounded import MOST_ROWS, PackedWeight, product
from inference_service.engine.kernels.rounded.launch import packed_halves, round_rows, widened
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.layers.on_gpu import FP8, LARGEST_FP8, rounded_fp8
from inference_service.engine.layers.quantized import QuantizedLinear, require_able
from loramux_shared.faults import SettingsInvalid
from loramux_shared.runtime import Rounding

INTEGERS = [Rounding.INT8, Rounding.INT4]
DTYPES = [torch.float32, torch.bfloat16]


def _quantized(rows: int, width: int, quantization: Rounding) -> Quantized:
    found = quantize(torch.randn(rows, width) * torch.rand(rows, 1), quantization)
    assert found is not None
    return found


@pytest.mark.parametrize("quantization", INTEGERS)
def test_a_weight_is_off_by_half_a_step_at_most(quantization: Rounding) -> None:
    """A rounded weight is off by half a step of its group's scale at most; rows of zeros stay zero."""
    torch.manual_seed(0)
    weight = torch.randn(30, 96) * torch.logspace(-6, 3, 30)[:, None]
    weight[7] = 0
    found = quantize(weight, quantization)
    steps = found.scales.float().abs().repeat_interleave(found.group, dim=1)
    bound = 0.51 if quantization is Rounding.INT8 else 1.3  # of 4 bits, those at the end may be cut off
    assert ((found.widened() - weight).abs() <= bound * steps).all()
    assert torch.equal(found.widened()[7], weight[7])
    relative = (found.widened() - weight).norm(dim=1) / weight.norm(dim=1).clamp(min=1e-30)
    assert relative.max() < (0.012 if quantization is Rounding.INT8 else 0.11)


@pytest.mark.parametrize("quantization", INTEGERS)
def test_rounded_weights_are_multiplied_by_the_compiled_product_beside_amx_too(
    library: CDLL, quantization: Rounding
) -> None:
    """The compiled product multiplies rounded weights also where oneDNN multiplies whole ones with AMX."""
    ops = CpuOps(library, torch.bfloat16)
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    for ops.multiplies in (False, True):
        operations = NativeOperations(ops)
        assert type(operations.new_linear(weight, None, quantization)) is NativeLinear
        plain = operations.new_linear(weight)
        assert type(plain) is (NativeLinear if ops.multiplies else Linear)


def _in_integers(x: Tensor, weight: Quantized) -> Tensor:
    """The product in torch's integers, as `packed.h` says it for bfloat16: float32 before it is narrowed."""
    total = torch.zeros(len(x), len(weight.values))
    for begin in range(0, x.shape[1], ROUNDED):
        part = x[:, begin : begin + ROUNDED].float()
        largest = part.abs().amax(1, keepdim=True)
        times = torch.where(largest > 0, torch.tensor(127.0) / largest, 0)
        rounded = (part.double() * times.double()).round().long()
        sums = (rounded @ weight.values[:, begin : begin + ROUNDED].long().t()).double()
        step = largest / torch.tensor(127.0)
        if weight.bits == 4:
            step = step * weight.scales[:, begin // weight.group].float()
        total = (sums * step.double() + total.double()).float()
    return total if weight.bits == 4 else total * weight.scales[:, 0].float()


@pytest.mark.parametrize("quantization", INTEGERS)
@pytest.mark.parametrize(
    ("rows", "width", "columns"), [(1, 64, 1), (3, 544, 17), (9, 576, 200), (70, 96, 48), (5, 4416, 20)]
)
def test_the_product_in_bfloat16_is_that_of_integers(
    library: CDLL, quantization: Rounding, rows: int, width: int, columns: int
) -> None:
    """Bit for bit, over rows of many magnitudes, widths of several parts, and columns that fill no tile."""
    torch.manual_seed(rows)
    ops, weight = CpuOps(library, torch.bfloat16), _quantized(columns, width, quantization)
    scales = torch.exp2(torch.randint(-9, 9, (rows, width)))
    x = torch.full((rows, width + 3), torch.nan).bfloat16()[:, :width].copy_(torch.randn(rows, width) * scales)
    x[0] = 0
    tiled = ops.tiled_integers(weight)
    assert torch.equal(ops.linear(x, tiled), _in_integers(x, weight).bfloat16())


@pytest.mark.parametrize("quantization", INTEGERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 32, 5), (20, 576, 100), (9, 4416, 33)])
def test_native_and_torch_agree(
    library: CDLL, quantization: Rounding, dtype: torch.dtype, rows: int, width: int, columns: int
) -> None:
    """The native and the torch product agree with float64, but for the rounding of sums and of bfloat16 x."""
    torch.manual_seed(columns)
    ops, weight = CpuOps(library, dtype), _quantized(columns, width, quantization)
    x, bias = torch.randn(rows, width).to(dtype), torch.randn(columns).to(dtype)
    expected = x.double() @ weight.widened().double().t() + bias.double()
    tiled = ops.tiled_integers(weight, bias)
    bounds = (2e-6, 2e-6) if dtype is torch.float32 else (7e-3, 3e-3)
    for found, bound in zip((ops.linear(x, tiled), QuantizedLinear(weight, bias)(x)), bounds, strict=True):
        assert found.dtype is dtype
        assert (found.double() - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("quantization", INTEGERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_a_row_depends_on_no_other(library: CDLL, quantization: Rounding, dtype: torch.dtype) -> None:
    """A row has the same bits alone and in a batch."""
    torch.manual_seed(0)
    ops, weight = CpuOps(library, dtype), _quantized(300, 1024, quantization)
    tiled, x = ops.tiled_integers(weight), torch.randn(70, 1024).to(dtype)
    together = ops.linear(x, tiled)
    for size in (1, 6, 13):
        assert torch.equal(torch.cat([ops.linear(rows, tiled) for rows in torch.split(x, size)]), together)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(library: CDLL, value: float) -> None:
    """A value that is not finite stays so in its row: a broken activation must not look like an answer."""
    ops, weight = CpuOps(library, torch.bfloat16), _quantized(16, 64, Rounding.INT8)
    x = torch.randn(3, 64).bfloat16()
    x[1, 5] = value
    tiled = ops.tiled_integers(weight)
    found = ops.linear(x, tiled)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_widths_that_fill_no_vector_are_left_to_others(library: CDLL) -> None:
    """Four values of 8 bits stand together in each column, eight of 4 bits."""
    ops = CpuOps(library, torch.bfloat16)
    assert ops.tiled_integers(_quantized(4, 6, Rounding.INT8)) is None
    assert ops.tiled_integers(_quantized(4, 12, Rounding.INT8)) is not None


def test_rows_in_fp8_lose_a_sixteenth_at_most(fp8_device: str) -> None:
    """Rows in FP8 have three bits of fraction, and no value above the largest; by torch, and in one launch."""
    torch.manual_seed(0)
    rows = torch.randn(9, 72, device=fp8_device) * torch.logspace(-4, 4, 9, device=fp8_device)[:, None]
    rows[3] = 0
    large = rows.abs() > rows.abs().amax(1, keepdim=True) / 2**12
    for values, scales in (rounded_fp8(rows), round_rows(rows)):
        assert values.dtype is FP8
        assert values.float().abs().max() == LARGEST_FP8
        assert ((values.float() * scales - rows).abs()[large] <= rows.abs()[large] / 16).all()
        assert torch.equal(values[3].float(), rows[3])
    torch.testing.assert_close(scales, rounded_fp8(rows)[1])


def test_a_linear_in_fp8_reads_what_the_norm_before_it_rounded(fp8_device: str) -> None:
    """The product is that of rounded rows and weights; a launch rounds what no kernel has rounded."""
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64), torch.randn(48)
    operations = TritonOperations([], torch.bfloat16, torch.device(fp8_device))
    layer = operations.new_linear(weight.to(fp8_device), bias.bfloat16().to(fp8_device), Rounding.FP8)
    hidden = torch.randn(5, 64).bfloat16().to(fp8_device)
    x = operations.norm(hidden, RMSNorm(torch.ones_like(hidden[0]), 1e-5), None, None)
    found, none = planned(layer, x)
    assert not none
    assert len(planned(layer, x.clone())[1]) == 1
    wide = [(values.double() * scales).cpu() for values, scales in (round_rows(x), rounded_fp8(weight))]
    expected = wide[0] @ wide[1].t() + bias
    assert (found.cpu() - expected).norm() / expected.norm() < BOUND[torch.bfloat16]


@pytest.mark.parametrize(
    ("quantization", "device", "capability", "dtype", "why"),
    [
        ("fp8", "cpu", None, torch.bfloat16, "needs a GPU of capability 8.9 .* found a CPU. Set int8 or int4"),
        ("fp8", "cuda", (8, 0), torch.bfloat16, "found capability 8.0 and bfloat16. Set none"),
        ("int4", "cuda", (7, 5), torch.float16, "capability 8.0 .* found capability 7.5 and float16"),
        ("fp8", "cuda", (9, 0), torch.float32, "found capability 9.0 and float32"),
    ],
)
def test_what_a_device_cannot_do_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
    quantization: str,
    device: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    why: str,
) -> None:
    """An unsupported rounding is refused before the load, with the setting, its value and the reason."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(SettingsInvalid, match=f"LORAMUX_QUANTIZATION={quantization} .*{why}"):
        require_able(Rounding(quantization), torch.device(device), dtype)


def test_what_a_device_can_do_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers on any CPU, all of it on a GPU of today, nothing anywhere."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    able = [(kind, "cpu", torch.float16) for kind in (*INTEGERS, Rounding.NONE)]
    able += [(kind, "cuda", torch.bfloat16) for kind in Rounding]
    found = [require_able(kind, torch.device(device), dtype) for kind, device, dtype in able]
    assert found == [None] * len(able)


BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative error; the interpreter truncates to bf16."""


def _weight(columns: int, width: int, bits: int, device: str) -> PackedWeight:
    found = quantize(torch.randn(columns, width), Rounding.INT8 if bits == 8 else Rounding.INT4)
    packed = PackedWeight.of(found)
    return PackedWeight(packed.values.to(device), packed.scales.to(device), bits, width)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 40, 96), (17, 33, 544), (64, 32, 64), (65, 5, 96)])
def test_the_product_is_that_of_the_widened_weight(
    dtype: torch.dtype,
    bits: int,
    rows: int,
    columns: int,
    width: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The product is right for partial tiles, rows with a stride, a bias, and more rows than a tile."""
    torch.manual_seed(rows)
    weight, bias = _weight(columns, width, bits, device), torch.randn(columns).to(device, dtype)
    x = torch.full((rows, width + 8), torch.nan, dtype=dtype, device=device)[:, :width].normal_()
    found = product(x, weight, bias)
    with monkeypatch.context() as patch:
        patch.setattr("inference_service.engine.kernels.rounded.triton_kernels.OLD", True)
        in_smaller_tiles = product(x, weight, bias)
    assert (found.double() - in_smaller_tiles).norm() / found.double().norm() < BOUND[dtype]
    expected = x.double() @ widened(weight, torch.float32).double().t() + bias.double()
    assert found.dtype is dtype
    assert (found.double() - expected).norm() / expected.norm() < BOUND[dtype]
    assert (rows > MOST_ROWS) == (rows == 65)


@pytest.mark.parametrize("group", [32, 128])
def test_numbers_with_zero_points_mean_what_files_mean(group: int, device: str) -> None:
    """(number - zero point) * scale, exact in float32; of 4 bits in pairs of halves."""
    torch.manual_seed(0)
    numbers, width = torch.randint(-8, 8, (9, 256), dtype=torch.int8), 256
    zeros = torch.randint(-8, 8, (9, width // group), dtype=torch.int8)
    scales = torch.rand(9, width // group)
    values = packed_halves(numbers).to(device)
    weight = PackedWeight(values, scales.to(device), 4, width, zeros.to(device))
    apart = numbers.view(9, -1, group) - zeros[..., None]
    exact = (apart.float() * scales[..., None]).view(9, width).to(device)
    assert torch.equal(widened(weight, torch.float32), exact)
    x = torch.randn(3, width, device=device)
    torch.testing.assert_close(product(x, weight), x @ exact.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_depends_on_no_other_of_its_tile(bits: int, device: str) -> None:
    """A row has the same bits beside any others."""
    weight, x = _weight(32, 128, bits, device), torch.randn(16, 128, device=device)
    together = product(x, weight)
    x[1:] = torch.nan
    assert torch.equal(product(x, weight)[0], together[0])


def test_what_does_not_fit_is_refused(device: str) -> None:
    """Groups that are no whole number of halves, and zero points of 8 bits."""
    values, scales = torch.zeros(4, 64, dtype=torch.int8, device=device), torch.ones(4, 1, device=device)
    with pytest.raises(ValueError, match="groups of 4 bits do not fit"):
        PackedWeight(values, torch.ones(4, 8, device=device), 4, 128)
    with pytest.raises(ValueError, match="zero points are of 4 bits"):
        PackedWeight(values, scales, 8, 64, torch.zeros(4, 1, dtype=torch.int8, device=device))
    with pytest.raises(ValueError, match="x must have 64 values"):
        product(torch.zeros(1, 32, device=device), PackedWeight(values, scales, 8, 64))
