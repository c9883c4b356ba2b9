"""The kernels for GPUs, which Triton's interpreter runs too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from inference_service.backends.base import Attention, Turn
from inference_service.backends.torch import TorchOperations
from inference_service.kernels import rows
from inference_service.kernels.attention import (
    AttentionCapacity,
    AttentionTables,
    Context,
    Inputs,
    attend,
    pack_tables,
    prefill_tile,
)
from inference_service.kernels.rows import Activation
from inference_service.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    SegmentCapacity,
    Segments,
    lora_apply,
    pack_segments,
    workspace_numel,
)
from inference_service.layers.norm import RMSNorm
from inference_service.lora.bank import Bank
from inference_service.lora.packed import PackedAdapter
from inference_service.lora.segments import LONG_SEGMENT, Arrangement
from inference_service.lora.weights import AdapterWeights
from loramux_shared.bases.attention import AttentionSpec
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bundle.modules import BaseDims

MIN_ENTRIES: Final = 16
EVERY: Final = -1
"""A bit for each linear."""


class TritonOperations(TorchOperations):
    """One launch each, on a GPU or in Triton's interpreter."""

    def __init__(self, dims: BaseDims, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dims, dtype, device)
        self._tables: dict[AttentionCapacity, AttentionTables] = {}

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """The scale included."""
        return rows.embed(tokens, table, scale)

    def norm(self, hidden: Tensor, norm: RMSNorm, delta: Tensor | None, delta_norm: RMSNorm | None) -> Tensor:
        """Both norms and the sum."""
        weight = None if delta_norm is None else delta_norm.weight
        return rows.rms_norm(
            hidden, norm.weight, eps=norm.eps, offset=norm.offset, delta=delta, delta_weight=weight
        )

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """The product included."""
        return rows.gated(gate_up, activation)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """In place."""
        rows.softcap(logits, cap)
        return logits

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """From tables that are kept for steps of the same size class."""
        num_rows = max(context.row + context.length for context in contexts)
        longest = max(-(-context.end // block_size) for context in contexts)
        mixed = any(context.length > 1 for context in contexts)
        tile = prefill_tile(self._device, self._dtype, self._head_dim, self._num_heads // self._kv_heads)
        capacity = AttentionCapacity(
            rows=_class_of(num_rows),
            chunks=_class_of(len(contexts)),
            blocks_per_chunk=_class_of(longest),
            block_size=block_size,
            tile=tile if mixed else None,
            kv_heads=self._kv_heads,
            groups=len(windows),
        )
        if capacity not in self._tables:
            self._tables[capacity] = AttentionTables.allocate(capacity, self._device)
        tables = self._tables[capacity]
        tables.load(torch.from_numpy(pack_tables(capacity, contexts)))
        return TritonAttention(tables, windows)


class TritonAttention:
    """With the kernels for GPUs: norm, rotation and write in one launch, then one to three that attend."""

    def __init__(self, tables: AttentionTables, windows: Sequence[int | None] = (None,)) -> None:
        """Take the tables, which hold the step by the time that the launches run, and the groups' windows."""
        self._tables = {window: tables.of(group) for group, window in enumerate(windows)}

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """[T, rotary]."""
        return cos.squeeze(1), sin.squeeze(1)

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rows that belong to no chunk are 0."""
        inputs = Inputs(heads, *turn, keys, values)
        head_norm = None if norm is None else norm.of_heads
        return attend(inputs, self._tables[spec.window], spec, head_norm, sinks).flatten(1)


class TritonLora:
    """Adds the adapters' part to the output of a fused linear, on the device.

    A step's launches depend on the capacity of its segments and on the bank's addresses alone. So what was
    recorded with one step's segments serves every later step of that capacity, whatever adapters came and left.
    """

    name = "triton"
    home = torch.device("cpu")

    def __init__(
        self, groups: tuple[GroupShape, ...], num_layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._device = device
        self._linears = {
            (layer, group.name): layer * len(groups) + index
            for layer in range(num_layers)
            for index, group in enumerate(groups)
        }
        self._bank = Bank(groups, num_layers, dtype, device)
        self._segments: dict[SegmentCapacity, Segments] = {}
        self._workspaces: dict[SegmentCapacity, Tensor] = {}
        """Of each capacity its own, for a graph would not notice that larger memory took its place."""
        self._step: Segments | None = None
        self._touched = 0
        """A bit for each linear that is launched."""

    @property
    def num_slots(self) -> int:
        """Slots that were opened."""
        return self._bank.slots.num_slots

    @property
    def num_bytes(self) -> int:
        """Memory of the device that adapters take."""
        return self._bank.num_bytes

    def open(self, num_bytes: int, max_rank: int, num_slots: int) -> None:
        """Take the device's memory; steps may be recorded from then on."""
        self._bank.open(num_bytes, max_rank, num_slots)

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Pack an adapter into memory that a GPU can copy from."""
        return self._bank.pack(weights)

    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Copy it beside the steps."""
        self._bank.copy(packed, offset)

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Fill a slot, behind the steps that were launched."""
        self._bank.enter(slot, offset, packed)

    def leave(self, slot: int) -> None:
        """Empty a slot, behind the steps that were launched."""
        self._bank.leave(slot)

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step: one copy to the device."""
        segments = arrangement.segments
        touched = self._bank.slots.touched([segment.slot for segment in segments])
        rows = np.arange(segments[0].start, segments[-1].end)
        slots = np.repeat([seg.slot for seg in segments], [seg.length for seg in segments])
        long = any(segment.length >= LONG_SEGMENT for segment in segments)
        tile = PREFILL_TILE if long else DECODE_TILE
        entries, active = max(MIN_ENTRIES, _class_of(len(rows))), _class_of(len(segments))
        capacity = SegmentCapacity(entries, self.num_slots, tile, active=active)
        if capacity not in self._segments:
            self._segments[capacity] = Segments.allocate(capacity, self._device)
        host = torch.empty(capacity.packed_size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        pack_segments(capacity, slots, token_ids=rows, out=host.numpy())
        self._segments[capacity].load(host)
        self.use(self._segments[capacity])
        self._touched = touched

    def use(self, segments: Segments) -> None:
        """Compute what follows with segments that somebody else fills, for instance between replays.

        Nothing is known of their adapters, so there is a launch for every linear.
        """
        self._touched = EVERY
        capacity = segments.capacity
        if capacity not in self._workspaces:
            of_layer = [group for (layer, _), group in self._bank.groups.items() if layer == 0]  # all are alike
            needed = max(workspace_numel(group, segments) for group in of_layer)
            self._workspaces[capacity] = torch.empty(needed, dtype=torch.float32, device=self._device)
        self._step = segments

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        linear = layer, group
        if self._step is not None and self._touched >> self._linears[linear] & 1:
            lora_apply(x, out, self._bank.groups[linear], self._step, self._workspaces[self._step.capacity])


def _class_of(number: int) -> int:
    """The power of two that holds a number, so that there are few tables and few kinds of launches."""
    return 1 << (number - 1).bit_length()
