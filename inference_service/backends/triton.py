"""The kernels for GPUs, which Triton's interpreter runs too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from inference_service.backends.base import Attention, Recurrence, StepLora, Turn
from inference_service.backends.grouped import GroupedOperations
from inference_service.backends.torch import TorchOperations
from inference_service.kernels import rows
from inference_service.kernels.attention import (
    AttentionCapacity,
    AttentionTables,
    Context,
    Cut,
    Inputs,
    attend,
    cut_of,
    pack_tables,
)
from inference_service.kernels.delta import (
    DeltaCapacity,
    DeltaTables,
    StateChunk,
    delta_tile,
    gated_delta,
    pack_delta,
)
from inference_service.kernels.experts import ByExpert
from inference_service.kernels.experts.segments import Owners, allocate, capacity_of, fill, owners_of
from inference_service.kernels.integers import quantize
from inference_service.kernels.launch import SideStream
from inference_service.kernels.packing import power_of_two
from inference_service.kernels.rounded import PackedWeight, round_rows
from inference_service.kernels.rows import Activation
from inference_service.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    Group,
    SegmentCapacity,
    Segments,
    Update,
    expand,
    lora_apply,
    pack_segments,
    shrink,
    update,
    workspace_numel,
)
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.layers.on_gpu import Fp8Linear, PackedLinear
from inference_service.lora.bank import Bank
from inference_service.lora.packed import PackedAdapter
from inference_service.lora.segments import LONG_SEGMENT, Arrangement, entries_of
from inference_service.lora.slots import experts_of
from inference_service.lora.weights import AdapterWeights
from loramux_shared.bases.groups import MODULES_APART, GroupShape
from loramux_shared.bases.rope import AttentionSpec, HeadCounts
from loramux_shared.runtime import Rounding

MIN_ENTRIES: Final = 16
EVERY: Final = -1
"""A bit for each linear."""


class TritonOperations(GroupedOperations, TorchOperations):
    """One launch each, on a GPU or in Triton's interpreter."""

    keeps_integers = True

    def __init__(
        self,
        heads: Sequence[HeadCounts],
        dtype: torch.dtype,
        device: torch.device,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Take the distinct heads of the model's layers, and the rest as `TorchOperations`.

        Raises:
            ValueError: there is no tile for them.
        """
        super().__init__(dtype, device, cache_dtype)
        self._cuts = {each: cut_of(device, dtype, each) for each in heads}
        self._deltas: dict[DeltaCapacity, DeltaTables] = {}
        self._tables: dict[AttentionCapacity, AttentionTables] = {}

    def new_linear(
        self, weight: Tensor, bias: Tensor | None = None, quantization: Rounding = Rounding.NONE
    ) -> Linear:
        """Return a linear that widens integers in registers, or rounds rows to fp8 in one launch."""
        quantized = quantize(weight, quantization)
        if quantized is not None:
            return PackedLinear(PackedWeight.of(quantized), bias)
        if quantization is Rounding.FP8 and Fp8Linear.takes(weight):
            return Fp8Linear(weight, bias, round_rows)
        return super().new_linear(weight, bias)

    def adapted(self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str) -> Tensor:
        """The adapters' first half beside the base's product, where that is recorded."""
        if isinstance(lora, TritonLora):
            return lora.adapted(partial(self.linear, layer, x), x, index, group)
        return super().adapted(layer, x, lora, index, group)

    def begun(
        self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """The second half is left to what reads the output, in steps of few rows."""
        if isinstance(lora, TritonLora):
            return lora.begun(partial(self.linear, layer, x), x, index, group)
        return super().begun(layer, x, lora, index, group)

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """The scale included."""
        return rows.embed(tokens, table, scale)

    def norm(
        self,
        hidden: Tensor,
        norm: RMSNorm,
        delta: Tensor | None,
        delta_norm: RMSNorm | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Both norms and the sum."""
        weight = None if delta_norm is None else delta_norm.weight
        return rows.rms_norm(
            hidden, norm.weight, eps=norm.eps, offset=norm.offset, delta=delta, delta_weight=weight, out=out
        )

    def gated(self, gate_up: Tensor, activation: Activation, update: Update | None = None) -> Tensor:
        """The product and the update included."""
        return rows.gated(gate_up, activation, update)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Cap the logits in place."""
        rows.softcap(logits, cap)
        return logits

    def recurrence(self, contexts: Sequence[Context]) -> Recurrence:
        """Return a recurrence of kernels, with tables that are reused for steps of the same size class."""
        chunks = [StateChunk.of(context) for context in contexts]
        size = power_of_two(len(chunks))
        capacity = DeltaCapacity(size, size)
        if any(chunk.length > 1 for chunk in chunks):
            rows = power_of_two(sum(chunk.length for chunk in chunks))
            capacity = DeltaCapacity(rows, size, delta_tile(self._dtype))
        if capacity not in self._deltas:
            self._deltas[capacity] = DeltaTables.allocate(capacity, self._device)
        tables = self._deltas[capacity]
        tables.load(torch.from_numpy(pack_delta(capacity, chunks)))
        return partial(gated_delta, tables=tables)

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """Return attention with tables that are reused for steps of the same size class."""
        num_rows = max(context.row + context.length for context in contexts)
        longest = max(-(-context.end // block_size) for context in contexts)
        mixed = any(context.length > 1 for context in contexts)
        tables: dict[Cut, AttentionTables] = {}
        for cut in dict.fromkeys(self._cuts.values()):
            capacity = AttentionCapacity(
                rows=power_of_two(num_rows),
                chunks=power_of_two(len(contexts)),
                blocks_per_chunk=power_of_two(longest),
                block_size=block_size,
                tile=cut.tile if mixed else None,
                kv_heads=cut.kv_heads,
                groups=len(windows),
            )
            if capacity not in self._tables:
                self._tables[capacity] = AttentionTables.allocate(capacity, self._device)
            tables[cut] = self._tables[capacity]
            tables[cut].load(torch.from_numpy(pack_tables(capacity, contexts)))
        return TritonAttention({heads: tables[cut] for heads, cut in self._cuts.items()}, windows)


class TritonAttention:
    """Attention with the kernels for GPUs.

    Update, norm, rotation and write in one launch, then one to three that attend.
    """

    def __init__(
        self, tables: Mapping[HeadCounts, AttentionTables], windows: Sequence[int | None] = (None,)
    ) -> None:
        """Take the tables of layers by their heads, and the windows of the groups that they hold.

        They hold the step by the time that the launches run.
        """
        self.tables = {
            (heads, window): each.of(group)
            for heads, each in tables.items()
            for group, window in enumerate(windows)
        }

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
        scales: Tensor | None = None,
        update: Update | None = None,
    ) -> Tensor:
        """Rows that belong to no chunk are 0."""
        inputs = Inputs(heads, *turn, keys, values, writes=spec.keys_of is None, scales=scales)
        tables, head_norm = self.tables[inputs.counts, spec.window], None if norm is None else norm.of_heads
        return attend(inputs, tables, spec, head_norm, sinks, update).flatten(1)


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
        self.vocabularies = self._bank.vocabularies
        self._of_experts = experts_of(groups, num_layers)
        self._owners: list[Owners] | None = None
        """Owners of the step's tokens, in each pass, once a layer has asked."""
        self._by_expert: tuple[ByExpert, list[Segments]] | None = None
        """Experts of the layer that asked last, in each pass."""
        self._segments: dict[SegmentCapacity, Segments] = {}
        self._of_passes: dict[SegmentCapacity, list[Segments]] = {}
        """Those of experts' pairs."""
        self._workspaces: dict[SegmentCapacity, Tensor] = {}
        """Workspaces by capacity: a graph would not notice that larger memory took the place of one."""
        self._workspace = torch.empty(0)
        """Workspace of the step."""
        self._passes: int | None = None
        """Those that are launched; None: all."""
        self._numels: dict[SegmentCapacity, int] = {}
        """Elements of the workspace of a capacity."""
        self._records = False
        """Whether the step may be recorded: then one stream beside the steps' is its own."""
        self._side: SideStream | None = None
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

    @property
    def slot_bytes(self) -> int:
        """Rank and places of all modules."""
        return self._bank.slot_bytes

    def open(self, num_bytes: int, max_rank: int, num_slots: int, host_bytes: int = 0) -> None:
        """Take the device's memory, and that of the host; steps may be recorded from then on."""
        self._bank.open(num_bytes, max_rank, num_slots, host_bytes)

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
        entries = entries_of(segments)
        long = any(segment.length >= LONG_SEGMENT for segment in segments)
        tile = PREFILL_TILE if long else DECODE_TILE
        capacity = SegmentCapacity(
            max(MIN_ENTRIES, power_of_two(len(entries.rows))),
            self.num_slots,
            tile,
            power_of_two(arrangement.most_parts),
            scaled=bool(arrangement.mixed),
            active=power_of_two(len(segments)),
        )
        if capacity not in self._segments:
            self._segments[capacity] = Segments.allocate(capacity, self._device)
        host = torch.empty(capacity.packed_size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        scales = entries.scales if arrangement.mixed else None
        pack_segments(capacity, entries.slots, token_ids=entries.rows, scales=scales, out=host.numpy())
        self._segments[capacity].load(host)
        self.use(self._segments[capacity])
        self._touched, self._records = touched, False

    def use(self, segments: Segments, passes: int | None = None, *, experts: bool = True) -> None:
        """Compute the next passes with segments that the caller fills, for instance between replays.

        Nothing is known of their adapters, so there is a launch for every linear, or without experts for every
        other one. Where at most so many passes are in use the others are not launched, in memory that is given
        back: that is not to be recorded.
        """
        self._touched = EVERY if experts else EVERY & ~sum(self._of_experts)
        capacity = segments.capacity
        if passes is None and capacity in self._workspaces:
            self._workspace = self._workspaces[capacity]
        else:
            self._workspace = self._new_workspace(segments, self._bank.groups.values())
            if passes is None:
                self._workspaces[capacity] = self._workspace
        self._passes, self._records = passes, passes is None
        self._step, self._owners, self._by_expert = segments, None, None

    def _new_workspace(self, segments: Segments, groups: Iterable[Group]) -> Tensor:
        """Memory for any of these linears."""
        needed = self._numels.get(segments.capacity)
        if needed is None:
            needed = max(workspace_numel(group, segments) for group in groups)
            self._numels[segments.capacity] = needed
        return torch.empty(needed, dtype=torch.float32, device=self._device)

    def adapted(self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str) -> Tensor:
        """Return what the base's product gives [T, all slices], with what the adapters make of x [T, in]."""
        out, segments = self._shrunk(base, x, layer, group)
        if segments is not None:
            for launch in expand(out, self._bank.groups[layer, group], segments, self._workspace)[
                : self._passes
            ]:
                launch()
        return out

    def begun(
        self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """Return what `adapted` does, or in steps of few rows what the base gives, and the missing update."""
        if self._step is None or not self._step.capacity.rows:
            return self.adapted(base, x, layer, group), None
        out, segments = self._shrunk(base, x, layer, group)
        if segments is None:
            return out, None
        return out, update(self._bank.groups[layer, group], segments, self._workspace)

    def _shrunk(
        self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str
    ) -> tuple[Tensor, Segments | None]:
        """Return the base's product, and the segments to expand; None where no adapter touches it."""
        linear = layer, group
        if self._step is None or not self._touched >> self._linears[linear] & 1:
            return base(), None
        first = shrink(x, self._bank.groups[linear], self._step, self._workspace)
        if self._records:
            self._side = self._side or SideStream(self._device)
            self._side.launch(first)
            out = base()
            self._side.join()
        else:
            first()
            out = base()
        return out, self._step

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        self.adapted(lambda: out, x, layer, group)

    def adapts_experts(self, layer: int) -> bool:
        """Return whether launches of the step add to experts of a layer."""
        return self._step is not None and self._touched & self._of_experts[layer] != 0

    @property
    def has_experts(self) -> bool:
        """Return True for a base with experts, which few adapters touch."""
        return self._bank.num_experts > 0

    def touch_experts(self, slots: Iterable[int]) -> bool:
        """Return whether an adapter in one of these slots adds to an expert."""
        return self._bank.slots.touched(slots) & sum(self._of_experts) != 0

    def apply_experts(self, x: Tensor, out: Tensor, layer: int, group: str, pairs: ByExpert) -> None:
        """The same of each place's expert, with segments that are made on the device once per layer."""
        if self._step is None or not self.adapts_experts(layer):
            return
        of_experts = self._bank.experts[layer, group]
        for segments in self._segments_of(pairs, self._step):
            lora_apply(x, out, of_experts, segments, self._workspaces[segments.capacity])

    def _segments_of(self, pairs: ByExpert, step: Segments) -> list[Segments]:
        """The segments of a layer's pairs, pass by pass: of the first adapters of tokens, of the second, ..."""
        if self._by_expert is not None and self._by_expert[0] is pairs:
            return self._by_expert[1]
        places, bank = len(pairs.tokens), self._bank
        if self._owners is None:
            self._owners = owners_of(step, places // pairs.top_k, self.num_slots, self._passes)
        numbers = self.num_slots * bank.slot_stride + (bank.num_experts - 1) * MODULES_APART + 1
        capacity = capacity_of(step.capacity, places, bank.num_experts, numbers)
        made = self._of_passes.setdefault(capacity, [])
        while len(made) < len(self._owners):
            made.append(allocate(capacity, self._device))
        if capacity not in self._workspaces:
            self._workspaces[capacity] = self._new_workspace(made[0], bank.experts.values())
        segments = made[: len(self._owners)]
        for each, owners in zip(segments, self._owners, strict=True):
            fill(each, pairs, owners, slot_stride=bank.slot_stride, expert_stride=MODULES_APART)
        self._by_expert = pairs, segments
        return segments
