"""LoRA with the SGMV kernels: two launches per fused linear, whatever adapters a step has."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inference_service.core.groups import GroupShape
from inference_service.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    Group,
    SegmentCapacity,
    Segments,
    Slices,
    lora_apply,
    pack_segments,
    pack_table,
    workspace_numel,
)
from inference_service.lora.segments import LONG_SEGMENT, Arrangement
from inference_service.lora.weights import AdapterWeights

MIN_ENTRIES = 16


class TritonLora:
    """Adds the adapters' part to the output of a fused linear, on the device.

    Adapters stay in the host's memory as they were loaded, and are packed together on the device before the
    next step.
    """

    name = "triton"
    home = torch.device("cpu")

    def __init__(self, groups: tuple[GroupShape, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = groups
        self._dtype = dtype
        self._device = device
        self._adapters: list[AdapterWeights] = []
        self._groups: dict[tuple[int, str], Group] = {}
        self._segments: dict[tuple[int, int], Segments] = {}
        self._workspace = torch.empty(0, dtype=torch.float32, device=device)
        self._step: Segments | None = None

    def load(self, weights: AdapterWeights) -> int:
        """Take an adapter in; the packed copy on the device is made anew before the next step."""
        self._adapters.append(weights)
        self._groups.clear()
        self._segments.clear()
        return len(self._adapters) - 1

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step: one copy to the device."""
        if not self._groups:
            self._pack_all()
        segments = arrangement.segments
        rows = np.arange(segments[0].start, segments[-1].end)
        slots = np.repeat([seg.slot for seg in segments], [seg.length for seg in segments])
        long = any(segment.length >= LONG_SEGMENT for segment in segments)
        entries = max(MIN_ENTRIES, 1 << (len(rows) - 1).bit_length())
        self._step = self._buffers(entries, PREFILL_TILE if long else DECODE_TILE)
        self._step.load(torch.from_numpy(pack_segments(self._step.capacity, slots, token_ids=rows)))

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        packed = self._groups.get((layer, group))
        if packed is not None and self._step is not None:
            lora_apply(x, out, packed, self._step, self._workspace)

    def _pack_all(self) -> None:
        for layer in range(len(self._adapters[0].layers)):
            for shape in self._shapes:
                group = _pack(self._adapters, layer, shape, self._dtype, self._device)
                if group is not None:
                    self._groups[layer, shape.name] = group

    def _buffers(self, entries: int, tile: int) -> Segments:
        """Static buffers per size class, so that a launch's grid depends on the class alone."""
        key = entries, tile
        if key not in self._segments:
            segments = Segments.allocate(SegmentCapacity(entries, len(self._adapters), tile), self._device)
            needed = max(workspace_numel(group, segments) for group in self._groups.values())
            if needed > self._workspace.numel():
                self._workspace = torch.empty(needed, dtype=torch.float32, device=self._device)
            self._segments[key] = segments
        return self._segments[key]


def _pack(
    adapters: list[AdapterWeights], layer: int, shape: GroupShape, dtype: torch.dtype, device: torch.device
) -> Group | None:
    """Pack one fused linear of all adapters; None when no adapter touches it."""
    found = [weights.layers[layer].get(shape.name) for weights in adapters]
    none = (0,) * len(shape.modules)
    ranks = [none if weights is None else weights.ranks for weights in found]
    present = [weights for weights in found if weights is not None]
    if not present:
        return None
    slices = Slices(shape.out_offsets, shape.out_features)
    table = pack_table(ranks, slices)
    blocks = [b.reshape(-1) for weights in present for b in weights.b if b is not None]
    group = Group(
        a=torch.cat([weights.a for weights in present]).to(device, dtype),
        b=torch.cat(blocks).to(device, dtype),
        table=torch.from_numpy(table).to(device),
        slices=slices,
        max_rank=max(map(max, ranks)),
        max_rows=max(map(sum, ranks)),
    )
    group.check_table(table)
    return group
