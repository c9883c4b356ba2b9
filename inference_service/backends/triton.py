"""LoRA with the SGMV kernels: one or two launches per fused linear, whatever adapters a step has."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from inference_service.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    SegmentCapacity,
    Segments,
    lora_apply,
    pack_segments,
    workspace_numel,
)
from inference_service.lora.bank import Bank
from inference_service.lora.segments import LONG_SEGMENT, Arrangement
from inference_service.lora.weights import AdapterWeights
from loramux_shared.bases.groups import GroupShape

MIN_ENTRIES: Final = 16


class TritonLora:
    """Adds the adapters' part to the output of a fused linear, on the device.

    A step's launches depend on the capacity of its segments and on the bank's addresses alone. So what was
    recorded with one step's segments serves every later step of that capacity, until the next load.
    """

    name = "triton"
    home = torch.device("cpu")

    def __init__(self, groups: tuple[GroupShape, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._bank = Bank(groups, dtype, device)
        self._segments: dict[SegmentCapacity, Segments] = {}
        self._workspaces: dict[SegmentCapacity, Tensor] = {}
        """Of each capacity its own, for a graph would not notice that larger memory took its place."""
        self._step: Segments | None = None

    @property
    def num_slots(self) -> int:
        """Adapters that are loaded."""
        return self._bank.num_slots

    @property
    def num_bytes(self) -> int:
        """Memory of the device that adapters take."""
        return self._bank.num_bytes

    def load(self, weights: AdapterWeights) -> int:
        """Begin to copy an adapter to the device; graphs that were recorded before must be recorded again.

        Raises:
            ValueError: the packed adapter would mislead a kernel.
        """
        slot = self._bank.load(weights)
        self._segments.clear()
        self._workspaces.clear()
        self._step = None
        return slot

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step: one copy to the device."""
        segments = arrangement.segments
        rows = np.arange(segments[0].start, segments[-1].end)
        slots = np.repeat([seg.slot for seg in segments], [seg.length for seg in segments])
        long = any(segment.length >= LONG_SEGMENT for segment in segments)
        entries = max(MIN_ENTRIES, 1 << (len(rows) - 1).bit_length())
        capacity = SegmentCapacity(entries, self.num_slots, PREFILL_TILE if long else DECODE_TILE)
        if capacity not in self._segments:
            self._segments[capacity] = Segments.allocate(capacity, self._device)
        host = torch.empty(capacity.packed_size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        pack_segments(capacity, slots, token_ids=rows, out=host.numpy())
        self._segments[capacity].load(host)
        self.use(self._segments[capacity])

    def use(self, segments: Segments) -> None:
        """Compute what follows with segments that somebody else fills, for instance between replays."""
        self._bank.settle()
        capacity = segments.capacity
        if capacity not in self._workspaces:
            needed = max((workspace_numel(group, segments) for group in self._bank.groups.values()), default=0)
            self._workspaces[capacity] = torch.empty(needed, dtype=torch.float32, device=self._device)
        self._step = segments

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        packed = self._bank.groups.get((layer, group))
        if packed is not None and self._step is not None:
            lora_apply(x, out, packed, self._step, self._workspaces[self._step.capacity])
