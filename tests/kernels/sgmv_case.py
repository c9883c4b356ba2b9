"""Fresh random inputs for SGMV, in memory that is NaN where no kernel may look."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels import sgmv
from inference_service.engine.kernels.sgmv import reference
from inference_service.engine.kernels.sgmv.layout import FIELDS, ROW

GUARD = 16  # NaN elements around the weights, columns beside out
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest relative error of one token's update of one slice, beyond the rounding of out."""


@dataclass
class Case:
    """Arguments of both kernels."""

    x: Tensor
    out: Tensor
    group: sgmv.Group
    segments: sgmv.Segments
    workspace: Tensor

    def run(self) -> None:
        step = self.group, self.segments, self.workspace
        for launch in (sgmv.shrink(self.x, *step), *sgmv.expand(self.out, *step)):
            launch()


def make_group(
    ranks: Sequence[Sequence[int]], K: int, slices: sgmv.Slices, dtype: torch.dtype, device: str
) -> sgmv.Group:
    """Random adapters between guards; of every second slot, each other slice has vectors."""
    table = sgmv.pack_table(ranks, slices, K)
    table[..., 1:3] += GUARD
    rank = table[..., 0]
    stride, sizes = -(-K // ROW) * ROW, np.array(slices.sizes)
    end = int((table[..., 2] + -(-rank * sizes // ROW) * ROW).max())
    span = 2 * -(-max(slices.sizes) // ROW) * ROW * 4 // dtype.itemsize
    table[::2, ::2, 3] = (
        end + GUARD + np.arange(table[::2, ::2, 3].size).reshape(table[::2, ::2, 3].shape) * span
    )
    weights = torch.full((end + GUARD + table[::2, ::2, 3].size * span + GUARD,), torch.nan)
    of_a = torch.randn(int(rank.sum()), K) / K**0.5
    of_b = torch.randn(int((rank * sizes).sum())) / max(1, rank.max()) ** 0.5
    for own, a, b, size in (
        (*fields[:3], size) for slot in table for fields, size in zip(slot, sizes, strict=True)
    ):
        weights[a : a + own * stride].view(own, stride)[:, :K], of_a = of_a[:own], of_a[own:]
        weights[b : b + own * size], of_b = of_b[: own * size], of_b[own * size :]
    spread = torch.zeros(len(table), len(sizes) + 2, FIELDS, dtype=torch.int64)  # beside what others have
    spread[:, 1:-1] = torch.from_numpy(table)
    group = sgmv.Group(
        with_vectors(weights.to(dtype), table, slices).to(device),
        spread.to(device)[:, 1:-1],
        slices,
        in_features=K,
        max_rank=int(rank.max()),
        max_rows=max(1, int(rank.sum(1).max())),
    )
    group.check_table(table)
    return group


def with_vectors(weights: Tensor, table: npt.NDArray[np.int64], slices: sgmv.Slices) -> Tensor:
    for slot, index in np.argwhere(table[..., 3]):
        size, first = slices.sizes[index], table[slot, index, 3]
        values = torch.full((2, -(-size // ROW) * ROW), torch.nan)
        values[:, :size] = torch.randn(2, size)
        bits = values.flatten().view(weights.dtype)
        weights[first : first + len(bits)] = bits
    return weights


def make_case(
    slots: Sequence[int],
    ranks: Sequence[Sequence[int]],
    K: int,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str,
    tile: int = 16,
    spare: int = 5,
    passes: int = 1,
    token_ids: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    rows: int = 0,
) -> Case:
    """``slots`` is per entry; ``spare`` is the room for further entries, or there is room for ``rows``."""
    torch.manual_seed(len(slots) * 1000 + K)
    slices = sgmv.Slices.consecutive(*sizes)
    group = make_group(ranks, K, slices, dtype, device)
    tokens = np.arange(len(slots)) if token_ids is None else np.array(token_ids)
    entries = rows or len(slots) + spare
    capacity = sgmv.SegmentCapacity(entries, len(ranks), tile, passes, scaled=scales is not None, rows=rows)
    segments = sgmv.Segments.allocate(capacity, device)
    segments.load(torch.from_numpy(sgmv.pack_segments(capacity, slots, token_ids=tokens, scales=scales)))

    x = torch.randn(int(tokens.max()) + 2, K)
    base = np.setdiff1d(np.arange(x.shape[0]), tokens[np.array(slots) >= 0])
    x[base] = torch.nan
    out = torch.randn(x.shape[0], slices.out_features + GUARD)
    workspace = torch.full((sgmv.workspace_numel(group, segments),), torch.nan)
    return Case(x.to(device, dtype), out.to(device, dtype), group, segments, workspace.to(device))


def expect_right(case: Case) -> Tensor:
    """Run a case, and compare its updates with fp64; return its output as it was before."""
    before = case.out.clone()
    case.run()
    assert relative_errors(case.out, before, case).max() <= TOLERANCE[case.out.dtype]
    return before


def relative_errors(got: Tensor, before: Tensor, case: Case) -> Tensor:
    """[tokens, slices]: each update's error against fp64, beyond one ulp of out's own rounding per pass."""
    expected = reference.lora_apply(case.x, before, case.group, case.segments, torch.float64)
    ulp = torch.finfo(got.dtype).eps * case.segments.capacity.passes
    error = (got.double() - expected).abs() - ulp * torch.maximum(expected.abs(), before.double().abs())
    slices, errors = case.group.slices, []
    for first, size in zip(slices.offsets, slices.sizes, strict=True):
        columns = slice(first, first + size)
        update = (expected - before.double())[:, columns].norm(dim=1)
        beyond = error[:, columns].clamp(min=0).norm(dim=1)
        errors.append(torch.where(beyond == 0, beyond, beyond / update))
    return torch.stack(errors, 1)
