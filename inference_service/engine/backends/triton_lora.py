"""Adapters with the kernels for GPUs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.kernels.experts import ByExpert
from inference_service.engine.kernels.experts.segments import Owners, PairSegments, capacity_of, owners_of
from inference_service.engine.kernels.launch import Launch, SideStream
from inference_service.engine.kernels.packing import power_of_two
from inference_service.engine.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    Group,
    SegmentCapacity,
    Segments,
    Update,
    expand,
    pack_segments,
    shrink,
    update,
    workspace_numel,
)
from inference_service.engine.lora.bank import Bank
from inference_service.engine.lora.segments import LONG_SEGMENT, Arrangement, entries_of
from inference_service.engine.lora.slots import experts_of
from loramux_shared.bases.groups import MODULES_APART, GroupShape

MIN_ENTRIES: Final = 16
EVERY: Final = -1
"""A bit for each linear."""


class TritonLora(Bank, LoraBackend):
    """Adds the adapters' part to the output of a fused linear, on the device.

    A step's launches depend on the capacity of its segments and on the bank's addresses alone. So what was
    recorded with one step's segments serves every later step of that capacity, whatever adapters came and left.
    """

    name = "triton"

    def __init__(
        self, groups: tuple[GroupShape, ...], num_layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(groups, num_layers, dtype, device)
        self._linears = {
            (layer, group.name): layer * len(groups) + index
            for layer in range(num_layers)
            for index, group in enumerate(groups)
        }
        self._of_experts = experts_of(groups, num_layers)
        self._owners: list[Owners] | None = None
        """Owners of the step's tokens, in each pass, once a layer has asked."""
        self._by_expert: tuple[ByExpert, list[Segments]] | None = None
        """Experts of the layer that asked last, in each pass."""
        self._segments: dict[SegmentCapacity, Segments] = {}
        self._of_passes: dict[SegmentCapacity, list[PairSegments]] = {}
        """Those of experts' pairs."""
        self._workspaces: dict[SegmentCapacity, Tensor] = {}
        """Workspaces by capacity: a graph would not notice that larger memory took the place of one."""
        self._workspace = torch.empty(0)
        """Workspace of the step."""
        self._passes: int | None = None
        """Those that are launched; None: all."""
        self._numels: dict[SegmentCapacity, int] = {}
        """Elements of the workspace of a capacity."""
        self._forks = False
        """Whether shrink runs beside the base's product: not in proofs, which have another thread."""
        self._side: SideStream | None = None
        self._step: Segments | None = None
        self._touched = 0
        """A bit for each linear that is launched."""

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step: one copy to the device."""
        segments = arrangement.segments
        touched = self.touched([segment.slot for segment in segments])
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
        self._touched, self._forks = touched, False

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
            self._workspace = self._new_workspace(segments, self.groups.values())
            if passes is None:
                self._workspaces[capacity] = self._workspace
        self._passes, self._forks = passes, True
        self._step, self._owners, self._by_expert = segments, None, None

    def _new_workspace(self, segments: Segments, groups: Iterable[Group]) -> Tensor:
        needed = self._numels.get(segments.capacity)
        if needed is None:
            needed = max(workspace_numel(group, segments) for group in groups)
            self._numels[segments.capacity] = needed
        return torch.empty(needed, dtype=torch.float32, device=self._device)

    def apply_with_lora(self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str) -> Tensor:
        """Return what the base's product gives [T, all slices], with what the adapters make of x [T, in]."""
        out, segments = self._shrink(base, x, layer, group)
        if segments is not None:
            for launch in expand(out, self.groups[layer, group], segments, self._workspace)[: self._passes]:
                launch()
        return out

    def apply_deferring_lora(
        self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """Return [T, all slices]; in steps of few rows the adapters' update is returned apart."""
        if self._step is None or not self._step.capacity.rows:
            return self.apply_with_lora(base, x, layer, group), None
        out, segments = self._shrink(base, x, layer, group)
        if segments is None:
            return out, None
        return out, update(self.groups[layer, group], segments, self._workspace)

    def _shrink(
        self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str
    ) -> tuple[Tensor, Segments | None]:
        """Return the base's product, and the segments to expand; None where no adapter touches it."""
        linear = layer, group
        if self._step is None or not self._touched >> self._linears[linear] & 1:
            return base(), None
        first = shrink(x, self.groups[linear], self._step, self._workspace)
        return self._beside([first], base), self._step

    def _beside(self, launches: Sequence[Launch], base: Callable[[], Tensor]) -> Tensor:
        """Return the base's product, beside which a step runs launches; a proof runs them before."""
        if not self._forks:
            for launch in launches:
                launch()
            return base()
        self._side = self._side or SideStream(self._device)
        for launch in launches:
            self._side.launch(launch)
        out = base()
        self._side.join()
        return out

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        self.apply_with_lora(lambda: out, x, layer, group)

    def adapts_experts(self, layer: int) -> bool:
        """Return whether launches of the step add to experts of a layer."""
        return self._step is not None and self._touched & self._of_experts[layer] != 0

    @property
    def has_experts(self) -> bool:
        """Return True for a base with experts, which few adapters touch."""
        return self.num_experts > 0

    def touch_experts(self, slots: Iterable[int]) -> bool:
        """Return whether an adapter in one of these slots adds to an expert."""
        return self.touched(slots) & sum(self._of_experts) != 0

    def apply_experts(self, x: Tensor, out: Tensor, layer: int, group: str, pairs: ByExpert) -> None:
        """Add to out [pairs, all slices] what the adapters make of x, by each place's expert."""
        self.apply_experts_with_lora(lambda: out, x, layer, group, pairs, of_tokens=False)

    def apply_experts_with_lora(
        self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str, pairs: ByExpert, *, of_tokens: bool
    ) -> Tensor:
        """Return [pairs, all slices] of each place's expert, adapters included; x is by place or by token."""
        out, passes, others = self._shrink_experts(base, x, layer, group, pairs, of_tokens=of_tokens)
        for index, segments in enumerate(passes):
            if index:
                others[index - 1]()
            for launch in expand(
                out, self.experts[layer, group], segments, self._workspaces[segments.capacity]
            ):
                launch()
        return out

    def apply_experts_deferring_lora(
        self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str, pairs: ByExpert
    ) -> tuple[Tensor, Update | None]:
        """Return [pairs, all slices] of each place's expert, and an update that is missing; x is by token."""
        if self._step is None or self._step.capacity.passes > 1:
            return self.apply_experts_with_lora(base, x, layer, group, pairs, of_tokens=True), None
        out, passes, _ = self._shrink_experts(base, x, layer, group, pairs, of_tokens=True)
        if not passes:
            return out, None
        (segments,) = passes
        return out, update(self.experts[layer, group], segments, self._workspaces[segments.capacity])

    def _shrink_experts(
        self, base: Callable[[], Tensor], x: Tensor, layer: int, group: str, pairs: ByExpert, *, of_tokens: bool
    ) -> tuple[Tensor, list[Segments], list[Launch]]:
        """Return the base's product, the passes' segments to expand, and what shrinks for all but the first."""
        if self._step is None or not self.adapts_experts(layer):
            return base(), [], []
        passes, filling = self._segments_of(pairs, self._step)
        workspace = self._workspaces[passes[0].capacity]
        first, *others = (
            shrink(
                x,
                self.experts[layer, group],
                replace(segments, token_ids=pairs.tokens) if of_tokens else segments,
                workspace,
            )
            for segments in passes
        )
        return self._beside([*filling, first], base), passes, others

    def _segments_of(self, pairs: ByExpert, step: Segments) -> tuple[list[Segments], list[Launch]]:
        """Return the segments of a layer's pairs, of the first adapters of tokens, of the second, ...

        And what makes them, where the layer has not asked before.
        """
        if self._by_expert is not None and self._by_expert[0] is pairs:
            return self._by_expert[1], []
        places, launches = len(pairs.tokens), list[Launch]()
        if self._owners is None:
            tokens = places // pairs.top_k
            self._owners, launches = owners_of(step, tokens, self.num_slots, self._passes)
        numbers = self.num_slots * self.slot_stride + (self.num_experts - 1) * MODULES_APART + 1
        capacity = capacity_of(step.capacity, places, self.num_experts, numbers)
        made = self._of_passes.setdefault(capacity, [])
        while len(made) < len(self._owners):
            made.append(PairSegments.allocate(capacity, self._device))
        used = made[: len(self._owners)]
        segments = [each.segments for each in used]
        if capacity not in self._workspaces:
            self._workspaces[capacity] = self._new_workspace(segments[0], self.experts.values())
        self._by_expert = pairs, segments
        strides = {"slot_stride": self.slot_stride, "expert_stride": MODULES_APART}
        for each, owners in zip(used, self._owners, strict=True):
            launches += each.fill(pairs, owners, **strides)
        return segments, launches
