"""Adapters packed for the compiled operations on a CPU."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from inference_service.kernels.cpu.ops import ADAPTER_FIELDS, CpuOps, Table
from inference_service.lora.packed import Layout, Numbers, PackedAdapter, ranks_of
from inference_service.lora.weights import AdapterWeights
from loramux_shared.bases.groups import GroupShape

LANES: Final = 16
ADDRESSES: Final = [0, 4, 8, 12]
"""Which of an adapter's fields in a linear are addresses: A's, and B's of each slice."""


def native_layout(shapes: tuple[GroupShape, ...], units: int) -> Layout:
    """Return the layout of matrices that are packed with so many values to a unit."""
    return Layout(shapes, width=LANES * units, columns=LANES, ranks=units)


def pack_native(weights: AdapterWeights, layout: Layout, ops: CpuOps) -> PackedAdapter:
    """Pack an adapter; the table is [layers * groups, ADAPTER_FIELDS]."""
    ranks = ranks_of(weights, layout.shapes)
    first_a, first_b, numel = layout.places(ranks)
    matrices = torch.empty(numel, dtype=ops.dtype)
    pieces: list[tuple[int, ...]] = []
    alive: list[Tensor] = []
    to = matrices.data_ptr()
    places = np.stack([first_a, first_b], axis=-1) * matrices.itemsize + to
    for layer, placed in zip(weights.layers, places.tolist(), strict=True):
        for shape, first in zip(layout.shapes, layout.firsts, strict=True):
            group = layer.get(shape.name)
            if group is None:
                continue
            for index, (a, b) in enumerate(zip(group.a, group.b, strict=True), first):
                if a is not None and b is not None:
                    for kind, part in enumerate((a.to(ops.dtype), b.to(ops.dtype))):
                        alive.append(part)
                        pieces.append((part.data_ptr(), *part.stride(), *part.shape, kind, placed[index][kind]))
    if pieces:
        ops.pack(Table(np.array(pieces, dtype=np.int64)))
    table = _table(ranks, first_a * matrices.itemsize, first_b * matrices.itemsize, layout)
    return PackedAdapter(matrices, table, ranks, layout.linears(ranks))


def _table(ranks: Numbers, first_a: Numbers, first_b: Numbers, layout: Layout) -> Numbers:
    """The fields of all linears; what no adapter touches is zero."""
    table = np.zeros((len(ranks), len(layout.shapes), ADAPTER_FIELDS), dtype=np.int64)
    for index, (shape, first) in enumerate(zip(layout.shapes, layout.firsts, strict=True)):
        of_group = slice(first, first + len(shape.modules))
        fields = table[:, index]
        fields[:, 0], fields[:, 1] = first_a[:, first], ranks[:, of_group].sum(1)
        fields[:, 2] = len(shape.modules)
        for at, (module, column) in enumerate(zip(range(first, of_group.stop), shape.out_offsets, strict=True)):
            own = 3 + 4 * at
            fields[:, own], fields[:, own + 1] = ranks[:, module], first_b[:, module]
            fields[:, own + 2], fields[:, own + 3] = column, shape.out_features[at]
    return table.reshape(-1, ADAPTER_FIELDS)
