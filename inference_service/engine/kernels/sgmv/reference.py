"""The reference of the kernels, in plain torch: one segment after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from inference_service.engine.kernels.sgmv.layout import ROW, Group, Segments


def lora_apply(x: Tensor, out: Tensor, group: Group, segments: Segments, dtype: torch.dtype) -> Tensor:
    """Return ``out`` plus the adapters' updates, computed and returned in ``dtype``."""
    return expand(shrink(x, group, segments, dtype=dtype), group, segments, out)


def shrink(x: Tensor, group: Group, segments: Segments, *, dtype: torch.dtype) -> Tensor:
    """x A^T per entry: [1, entries, max_rows] in ``dtype``; the slices' ranks side by side, then zeros."""
    y = x.new_zeros(1, segments.capacity.entries, group.max_rows, dtype=dtype)
    for slot, entries in _runs(segments):
        column = 0
        for rank, first, _, _ in group.table[slot].tolist():
            a = group.weights[first : first + rank * group.stride_a].view(rank, group.stride_a)
            rows = x[segments.token_ids[entries].long()].to(dtype) @ a[:, : x.shape[1]].to(dtype).T
            y[0, entries, column : column + rank] = rows * _scale(segments, entries, dtype)
            column += rank
    return y


def expand(y: Tensor, group: Group, segments: Segments, out: Tensor) -> Tensor:
    """``out`` plus y B^T per entry, in y's dtype, then times c, plus d; the planes of y are summed first."""
    result, slices = out.to(y.dtype), group.slices
    for slot, entries in _runs(segments):
        tokens, column = segments.token_ids[entries].long(), 0
        for (rank, _, element, vectors), first, size in zip(
            group.table[slot].tolist(), slices.offsets, slices.sizes, strict=True
        ):
            own = result[:, first : first + size]
            if rank:  # without a rank, the values in y are undefined
                block = group.weights[element : element + rank * size].view(rank, size).to(y.dtype)
                own.index_add_(0, tokens, y[:, entries, column : column + rank].sum(0) @ block)
                column += rank
            if vectors:
                c, d = _vectors(group, vectors, size)
                own[tokens] = own[tokens] * c.to(y.dtype) + d.to(y.dtype)
    return result


def _vectors(group: Group, first: int, size: int) -> tuple[Tensor, Tensor]:
    begin, span = first * group.weights.itemsize // group.floats.itemsize, -(-size // ROW) * ROW
    c, d = group.floats[begin : begin + 2 * span].view(2, span)[:, :size]
    return c, d


def _runs(segments: Segments) -> Iterator[tuple[int, slice]]:
    starts, used = segments.seg_start.tolist(), int(segments.pass_start[-2])
    for i, slot in enumerate(segments.seg_slot[:used].tolist()):
        yield slot, slice(starts[i], starts[i + 1])


def _scale(segments: Segments, entries: slice, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if segments.scales is None else segments.scales[entries, None].to(dtype)
