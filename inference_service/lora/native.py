"""Adapters packed for the compiled operations on a CPU."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from inference_service.kernels.cpu.ops import ADAPTER_FIELDS, PIECE_FIELDS, SLICE_FIELDS, CpuOps, Table
from inference_service.lora.packed import Layout, PackedAdapter, with_vocabulary, write_vectors
from inference_service.lora.weights import AdapterWeights, Numbers
from loramux_shared.bases.groups import GroupShape

LANES: Final = 16
ADDRESSES: Final = [0, *range(4, ADAPTER_FIELDS, SLICE_FIELDS)]
"""Which of an adapter's fields in a linear are addresses: A's, and B's of each slice."""
VECTORS: Final = [*range(7, ADAPTER_FIELDS, SLICE_FIELDS)]
"""And which are where there are vectors, and 0 elsewhere."""


def native_layout(shapes: tuple[GroupShape, ...], units: int) -> Layout:
    """Return the layout of matrices that are packed with so many values to a unit."""
    return Layout(shapes, width=LANES * units, columns=LANES, ranks=units)


def pack_native(weights: AdapterWeights, layout: Layout, ops: CpuOps) -> PackedAdapter:
    """Pack an adapter; the table is [layers * groups, ADAPTER_FIELDS]."""
    first_a, first_b, numel = layout.places(weights.ranks)
    size = ops.dtype.itemsize
    vectors, end = layout.vectors(weights, numel, size)
    matrices, values = torch.empty(end, dtype=ops.dtype), weights.values.to(ops.dtype)
    adapted = np.nonzero(weights.ranks)
    rank, inside, outside = (
        weights.ranks[adapted],
        layout.in_features[adapted[1]],
        layout.out_features[adapted[1]],
    )
    pieces = np.empty((len(rank), 2, PIECE_FIELDS), dtype=np.int64)
    for kind, firsts, to, fields in (
        (0, weights.first_a, first_a, (inside, 1, rank, inside)),
        (1, weights.first_b, first_b, (1, rank, rank, outside)),  # transposed
    ):
        pieces[:, kind, 0] = values.data_ptr() + firsts[adapted] * size
        for field, each in enumerate((*fields, kind), 1):
            pieces[:, kind, field] = each
        pieces[:, kind, 6] = matrices.data_ptr() + to[adapted] * size
    if len(rank):
        ops.pack(Table(pieces.reshape(-1, PIECE_FIELDS)))
    write_vectors(weights, vectors, matrices)
    table = _table(weights.ranks, first_a * size, first_b * size, vectors * size, layout)
    packed = PackedAdapter(matrices, table, weights.ranks, layout.linears(weights.ranks, vectors))
    return with_vocabulary(packed, weights)


def _table(ranks: Numbers, first_a: Numbers, first_b: Numbers, vectors: Numbers, layout: Layout) -> Numbers:
    """The fields of all linears; what no adapter touches is zero."""
    table = np.zeros((len(ranks), len(layout.shapes), ADAPTER_FIELDS), dtype=np.int64)
    for index, (shape, first) in enumerate(zip(layout.shapes, layout.firsts, strict=True)):
        of_group = slice(first, first + len(shape.modules))
        fields = table[:, index]
        fields[:, 0], fields[:, 1] = first_a[:, first], ranks[:, of_group].sum(1)
        fields[:, 2] = len(shape.modules)
        for at, (module, column) in enumerate(zip(range(first, of_group.stop), shape.out_offsets, strict=True)):
            own = 3 + SLICE_FIELDS * at
            fields[:, own], fields[:, own + 1] = ranks[:, module], first_b[:, module]
            fields[:, own + 2], fields[:, own + 3] = column, shape.out_features[at]
            fields[:, own + 4] = vectors[:, module]
    return table.reshape(-1, ADAPTER_FIELDS)
