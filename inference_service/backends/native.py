"""LoRA with the compiled CPU operations: one call per fused linear, exact ranks, no packing per step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inference_service.kernels.cpu.ops import ADAPTER_FIELDS, CpuOps, Table, pack_a, pack_b
from inference_service.lora.segments import Arrangement
from inference_service.lora.weights import AdapterWeights, GroupWeights
from loramux_shared.bases.groups import GroupShape


class NativeLora:
    """Adds the adapters' part to the output of a fused linear."""

    name = "native"
    home = torch.device("cpu")

    def __init__(self, ops: CpuOps, groups: tuple[GroupShape, ...], num_layers: int) -> None:
        self._ops = ops
        self._groups = {group.name: group for group in groups}
        self._tables = {
            (layer, group.name): Table(np.zeros((0, ADAPTER_FIELDS), dtype=np.int64))
            for layer in range(num_layers)
            for group in groups
        }
        self._tensors: list[Tensor] = []
        """What the tables point into."""
        self._num_slots = 0
        self._most_ranks = 1
        self._segments = Table(np.zeros((0, 3), dtype=np.int64))
        self._workspace = torch.empty(0, 1)

    @property
    def num_bytes(self) -> int:
        """The packed matrices."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def load(self, weights: AdapterWeights) -> int:
        """Pack an adapter for the compiled operations; nothing else of it is kept."""
        for (layer, name), table in self._tables.items():
            group = weights.layers[layer].get(name)
            row = np.zeros((1, ADAPTER_FIELDS), dtype=np.int64)
            if group is not None:
                fields = self._pack(group, self._groups[name])
                row[0, : len(fields)] = fields
                self._most_ranks = max(self._most_ranks, sum(group.ranks))
            self._tables[layer, name] = Table(np.concatenate([table.values, row]))
        self._num_slots += 1
        return self._num_slots - 1

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        segments = arrangement.segments
        rows_of = [(segment.slot, segment.start, segment.length) for segment in segments]
        self._segments = Table(np.array(rows_of, dtype=np.int64))
        rows = segments[-1].end
        if self._workspace.shape[0] < rows or self._workspace.shape[1] < self._most_ranks:
            self._workspace = torch.empty(rows, self._most_ranks)

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        self._ops.lora(x, out, self._tables[layer, group], self._segments, self._workspace)

    def _pack(self, weights: GroupWeights, shape: GroupShape) -> Sequence[int]:
        """The table's fields of an adapter in one fused linear."""
        units = self._ops.units
        a = pack_a(weights.a.to(self._ops.dtype), units)
        self._tensors.append(a)
        fields = [a.data_ptr(), a.shape[0], len(shape.modules)]
        for rank, b, offset, size in zip(
            weights.ranks, weights.b, shape.out_offsets, shape.out_features, strict=True
        ):
            pointer = 0
            if b is not None:
                packed = pack_b(b.to(self._ops.dtype), units)
                self._tensors.append(packed)
                pointer = packed.data_ptr()
            fields += [rank, pointer, offset, size]
        return fields
