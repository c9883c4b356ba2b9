"""Products with weights of few bits, widened in registers, against fp64."""

from __future__ import annotations

import pytest
import torch

from inference_service.kernels.integers import quantize
from inference_service.kernels.rounded import MOST_ROWS, PackedWeight, product
from inference_service.kernels.rounded.launch import packed_halves, round_rows, widened
from inference_service.layers.on_gpu import rounded_fp8
from loramux_shared.runtime import Rounding

BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative error; the interpreter truncates to bf16."""


def _weight(columns: int, width: int, bits: int, device: str) -> PackedWeight:
    found = quantize(torch.randn(columns, width), Rounding.INT8 if bits == 8 else Rounding.INT4)
    assert found is not None
    packed = PackedWeight.of(found)
    return PackedWeight(packed.values.to(device), packed.scales.to(device), bits, width)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 40, 96), (17, 33, 544), (64, 32, 64), (65, 5, 96)])
def test_the_product_is_that_of_the_widened_weight(
    dtype: torch.dtype, bits: int, rows: int, columns: int, width: int, device: str
) -> None:
    """The product is right for partial tiles, rows with a stride, a bias, and more rows than a tile."""
    torch.manual_seed(rows)
    weight, bias = _weight(columns, width, bits, device), torch.randn(columns).to(device, dtype)
    x = torch.full((rows, width + 8), torch.nan, dtype=dtype, device=device)[:, :width].normal_()
    found = product(x, weight, bias)
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


def test_rows_are_rounded_to_fp8_in_one_launch(device: str) -> None:
    """The same as torch's operations, which are seven."""
    x = torch.randn(5, 72, device=device) * torch.logspace(-4, 4, 5, device=device)[:, None]
    x[2] = 0
    for found, expected in zip(round_rows(x), rounded_fp8(x), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.13, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    """Groups that are no whole number of halves, and zero points of 8 bits."""
    values, scales = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="groups of 4 bits do not fit"):
        PackedWeight(values, torch.ones(4, 8), 4, 128)
    with pytest.raises(ValueError, match="zero points are of 4 bits"):
        PackedWeight(values, scales, 8, 64, torch.zeros(4, 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="x must have 64 values"):
        product(torch.zeros(1, 32), PackedWeight(values, scales, 8, 64))
