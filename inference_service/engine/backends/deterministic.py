"""Operations whose answer for a row depends on that row alone: neither on how many there are nor on its place.

The compiled operations compute every row by itself. What is left are products, whose libraries choose another
order of summation for another number of rows, and what torch computes several values at a time, the last few
otherwise.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from inference_service.engine.backends.native import NativeLinear, NativeOperations
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.layers.linear import SIZES, Linear, in_pieces
from inference_service.engine.layers.rope import Rope
from loramux_shared.faults import SettingsInvalid

MOST_PRODUCTS: Final = 2**30
"""Most products of one call that is measured, from 16 rows on: more would take seconds."""
PROBES: Final = 8
SAMPLES: Final = 1 << 17
"""Values that are compared: two orders of one sum seldom differ once they are rounded to bfloat16."""
SPAN: Final = 64
"""Positions whose angles are computed together."""


Product = Callable[[Tensor], Tensor]
"""[T, in] to [T, out]."""


class DeterministicOperations(NativeOperations):
    """Compiled operations, products of few sizes, and the rest in pieces that are always the same."""

    by_row = True

    def __init__(self, ops: CpuOps) -> None:
        super().__init__(ops)
        self._sizes: dict[tuple[int, int, bool], tuple[int, ...]] = {}

    @property
    def own_products(self) -> bool:
        """Always, for their bits are known, be others faster or not."""
        return True

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Compute it with the compiled product, or else with those of as many rows as were seen to agree."""
        if isinstance(layer, NativeLinear):
            return layer(x)
        shape = layer.in_features, layer.out_features, layer.has_bias
        if shape not in self._sizes:
            self._sizes[shape] = agreeing_sizes(layer.product, layer.in_features, layer.out_features, x.dtype)
        return in_pieces(layer.product, x, self._sizes[shape])

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angles, each position always computed together with the same others."""
        spans, index = torch.unique(positions // SPAN, return_inverse=True)
        parts = [rope.at(torch.arange(SPAN) + first * SPAN) for first in spans.tolist()]
        rows = index * SPAN + positions % SPAN
        cos, sin = (torch.cat(part)[rows] for part in zip(*parts, strict=True))
        return cos, sin

    def gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Row by row."""
        pairs = zip(torch.split(x, 1), torch.split(gate, 1), strict=True)
        return torch.cat([super(DeterministicOperations, self).gate(*pair) for pair in pairs])

    def squares(self, x: Tensor) -> Tensor:
        """Row by row."""
        return torch.cat([super(DeterministicOperations, self).squares(row) for row in torch.split(x, 1)])

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Row by row."""
        return torch.cat(
            [super(DeterministicOperations, self).softcap(row, cap) for row in torch.split(logits, 1)]
        )

    def clamped(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """Row by row."""
        rows = torch.split(gate_up, 1)
        return torch.cat([super(DeterministicOperations, self).clamped(row, alpha, limit) for row in rows])

    def add_gated(self, out: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Row by row."""
        for parts in zip(torch.split(out, 1), torch.split(x, 1), torch.split(gate, 1), strict=True):
            super().add_gated(*parts)
        return out


def agreeing_sizes(
    product: Product, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Return the numbers of rows, falling, that give a row the same bits, and at every place among them.

    This is measured, with rows of many magnitudes: the order of summation is the library's, and depends on the
    processor, on the number of threads and on the sizes alone. Raise SettingsInvalid where no size gives a row
    the same bits at every place.
    """
    generator = torch.Generator().manual_seed(0)
    shape = max(PROBES, SAMPLES // out_features), in_features
    scales = torch.exp2(torch.randint(-4, 5, shape, generator=generator))
    probes = (torch.randn(shape, generator=generator) * scales).to(dtype)
    groups: list[tuple[Tensor, list[int]]] = []
    most = max(16, MOST_PRODUCTS // (in_features * out_features))
    for size in (size for size in SIZES if size <= most):
        answer = _answer(product, probes, size)
        group = next(
            (sizes for bits, sizes in groups if answer is not None and torch.equal(bits, answer)), None
        )
        if group is not None:
            group.append(size)
        elif answer is not None:
            groups.append((answer, [size]))
    if not groups:
        raise SettingsInvalid(
            "LORAMUX_DETERMINISTIC=true, but products of "
            f"{in_features} x {out_features} depend on a row's position in the batch on this machine. "
            "Set it to false."
        )
    best = max((sizes for _, sizes in groups), key=lambda sizes: (len(sizes), sizes[0]))
    return tuple(best)


def _answer(product: Product, probes: Tensor, size: int) -> Tensor | None:
    """Return [probes, out] by products of a size; None where it depends on the place of a row."""
    count = len(probes)
    index = torch.arange(-(-count // size) * size) % count
    found, shifted = (
        torch.cat([product(rows) for rows in torch.split(probes[order], size)])
        for order in (index, (index + 1) % count)
    )
    answer = found[:count]
    same = torch.equal(found, answer[index]) and torch.equal(shifted, answer[(index + 1) % count])
    return answer if same else None
