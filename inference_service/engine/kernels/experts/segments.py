"""Adapters of experts, for the SGMV kernels: an expert of an adapter is an adapter of its own.

Which expert has which token is known on the device alone, so the segments of a layer are made there. They hold
all places: those of the base belong to a slot that nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from inference_service.engine.kernels.experts.layout import ByExpert
from inference_service.engine.kernels.experts.tuning import SLOT_BLOCK, SORT_BLOCK, SORT_WARPS, SPAN
from inference_service.engine.kernels.launch import Launch, kernels_of
from inference_service.engine.kernels.sgmv import SegmentCapacity, Segments


class Owners(NamedTuple):
    """The adapters of a step's tokens, in one pass."""

    slots: Tensor
    """int32 [T]"""
    scales: Tensor | None
    """fp32 [T]; None where all are 1."""


def owners_of(
    segments: Segments, tokens: int, nobody: int, passes: int | None = None
) -> tuple[list[Owners], list[Launch]]:
    """Return the slots of so many tokens in each pass of a step's segments, or in the first ones.

    Tokens of no adapter have nobody's. And what is launched for it.
    """
    device, owners, launches, every = segments.packed.device, [], [], segments.capacity.rows == tokens
    grid = (segments.capacity.runs if every else segments.capacity.segments_per_pass,)
    for index in range(passes or segments.capacity.passes):
        slots = torch.empty(tokens, dtype=torch.int32, device=device)
        if not every:
            slots.fill_(nobody)
        scales = None if segments.scales is None else torch.ones(tokens, device=device)
        arguments = {
            "p_token_ids": segments.token_ids,
            "p_seg_start": segments.seg_start,
            "p_seg_slot": segments.seg_slot,
            "p_pass": segments.of_pass(index),
            "p_num_runs": segments.num_runs if every else None,
            "p_entry_scales": segments.scales,
            "p_slots": slots,
            "p_scales": scales,
            "nobody": nobody,
            "BLOCK": SLOT_BLOCK,
            "num_warps": 1,
        }
        launches.append(Launch(kernels_of(__name__).slots_kernel, grid, arguments))
        owners.append(Owners(slots, scales))
    return owners, launches


def capacity_of(step: SegmentCapacity, pairs: int, num_experts: int, slots: int) -> SegmentCapacity:
    """Return what the pairs of one pass need; ``slots`` is how many there are by the numbers that `fill` gives.

    Of each expert, places of the base come before those of all adapters, and those of padding behind them.
    """
    active = (step.distinct + 2) * num_experts
    return SegmentCapacity(pairs, slots, step.tile, scaled=step.scaled, active=active)


@dataclass(frozen=True)
class PairSegments:
    """The segments of the pairs of one pass; all layers share their memory."""

    segments: Segments
    counts: Tensor | None
    """int32 [programs]: the segments that each makes; None: there is one program."""

    @classmethod
    def allocate(cls, capacity: SegmentCapacity, device: torch.device) -> PairSegments:
        """Return memory of a capacity of `capacity_of`."""
        segments = Segments.over(capacity, torch.empty(capacity.packed_size, dtype=torch.int32, device=device))
        spans = -(-capacity.entries // SPAN)
        counts = torch.empty(spans, dtype=torch.int32, device=device) if spans > 1 else None
        return cls(replace(segments, num_runs=segments.pass_start[1:]), counts)

    def fill(self, pairs: ByExpert, owners: Owners, *, slot_stride: int, expert_stride: int) -> list[Launch]:
        """Return what makes the segments of a layer; an expert of a slot has the number that the strides say.

        Args:
            pairs: those of the layer.
            owners: of a pass.
            slot_stride: from a slot's first expert to the next slot's.
            expert_stride: from an expert to the next.
        """
        segments, kernels = self.segments, kernels_of(__name__)
        places = {
            "p_tokens": pairs.tokens,
            "p_experts": pairs.experts,
            "p_slots": owners.slots,
            "p_counts": self.counts,
            "P": len(pairs.tokens),
            "TILE": segments.capacity.tile,
            "BLOCK_P": SORT_BLOCK,
            "SPAN": SPAN,
            "num_warps": SORT_WARPS,
        }
        arguments = {
            **places,
            "p_scales": owners.scales,
            "p_token_ids": segments.token_ids,
            "p_seg_start": segments.seg_start,
            "p_seg_slot": segments.seg_slot,
            "p_place_scales": segments.scales,
            "p_pass_start": segments.pass_start,
            "slot_stride": slot_stride,
            "expert_stride": expert_stride,
        }
        grid = (1 if self.counts is None else len(self.counts),)
        counting = [] if self.counts is None else [Launch(kernels.starts_kernel, grid, places)]
        return [*counting, Launch(kernels.segments_kernel, grid, arguments)]
