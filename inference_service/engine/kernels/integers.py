"""Weights of 8 and 4 bits: integers, and a scale for each output channel or for each group of it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from loramux_shared.runtime import INT4_GROUP, Rounding

STEPS8: Final = 127
STEPS4: Final = (-8.8, -8.4, -8.0, -7.6, -7.2, -6.8, 7.0, 7.4, 8.0, 8.5)
"""Candidates of the largest value of a group in its steps; the nearest is taken. There is a -8 and no 8."""
PIECE: Final = 1 << 19
"""Values that are rounded, or widened, at once: 2 MB in float32."""


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] that is ``values * scales``."""

    values: Tensor
    """int8 [out, in], of 4 bits from -8 to 7."""
    scales: Tensor
    """bfloat16 [out, in / group]."""
    bits: int

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def widened(self) -> Tensor:
        """Return the weight in float32, exact."""
        rows, groups = self.scales.shape
        values = self.values.view(rows, groups, -1).float()
        return (values * self.scales.float()[..., None]).view(rows, -1)


def quantize(weight: Tensor, quantization: Rounding) -> Quantized | None:
    """Return a weight [out, in] in 8 or 4 bits; None where it is to stay, or its rows have no whole groups.

    Scales are rounded to bfloat16 first, and values to what is nearest with those.
    """
    width = weight.shape[1]
    bits = {Rounding.INT8: 8, Rounding.INT4: 4}.get(quantization)
    group = INT4_GROUP if bits == 4 else width
    if bits is None or width % group:
        return None
    pieces = torch.split(weight, max(1, PIECE // width))
    values, scales = zip(*_each(partial(_rounded, group=group, bits=bits), pieces), strict=True)
    return Quantized(torch.cat(values), torch.cat(scales), bits)


def _each(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], pieces: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return what becomes of each piece, on a CPU of several at once, each by one thread.

    The two threads of small operations wait for one another: where others want the cores, two minutes instead
    of twelve seconds for a base of 135M.
    """
    threads = torch.get_num_threads()
    if pieces[0].is_cuda or threads == 1:
        return [*map(function, pieces)]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return [*pool.map(function, pieces)]
    finally:
        torch.set_num_threads(threads)


def _rounded(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return values and scales of some rows."""
    rows, width = weight.shape
    scales_of, low, high = (_scales8, -STEPS8, STEPS8) if bits == 8 else (_scales4, -8, 7)
    parts = weight.to(torch.float32, copy=True).view(rows, width // group, group)
    scales = scales_of(parts)
    steps = parts.div_(scales.float()[..., None]).round_().clamp_(low, high)
    return steps.to(torch.int8).view(rows, width), scales


def _scales8(parts: Tensor) -> Tensor:
    """Return the scales [rows, 1] with which the largest of parts [rows, 1, values] is the last step."""
    return _usable(parts.abs().amax(-1) / STEPS8)


def _scales4(parts: Tensor) -> Tensor:
    """Return the scales [rows, groups] that lose least of parts [rows, groups, values], in squares."""
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = torch.full_like(largest, torch.inf)
    scales = torch.ones_like(largest, dtype=torch.bfloat16)
    for steps in STEPS4:
        tried = _usable(largest / steps)
        wide = tried.float()[..., None]
        lost = (parts / wide).round_().clamp_(-8, 7).mul_(wide).sub_(parts).square_().sum(-1)
        scales = torch.where(lost < best, tried, scales)
        best = torch.minimum(lost, best)
    return scales


def _usable(scales: Tensor) -> Tensor:
    narrow = scales.bfloat16()
    return torch.where(narrow == 0, torch.ones_like(narrow), narrow)
