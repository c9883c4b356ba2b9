"""Adapters of experts, for the SGMV kernels: an expert of an adapter is an adapter of its own.

Which expert has which token is known on the device alone, so the segments of a layer are made there. They hold
all places: those of the base belong to a slot that nobody has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inference_service.kernels.experts.layout import ByExpert
from inference_service.kernels.experts.tuning import SLOT_BLOCK, SORT_BLOCK, SORT_WARPS, SPAN
from inference_service.kernels.launch import Launch, kernels_of
from inference_service.kernels.sgmv import SegmentCapacity, Segments


class Owners(NamedTuple):
    """The adapters of a step's tokens, in one pass."""

    slots: Tensor
    """int32 [T]"""
    scales: Tensor | None
    """fp32 [T]; None where all are 1."""


def owners_of(segments: Segments, tokens: int, nobody: int, passes: int | None = None) -> list[Owners]:
    """Return the slots of so many tokens in each pass of a step's segments, or in the first ones.

    Those of none have nobody's.
    """
    device, owners = segments.packed.device, []
    for index in range(passes or segments.capacity.passes):
        slots = torch.full((tokens,), nobody, dtype=torch.int32, device=device)
        scales = None if segments.scales is None else torch.ones(tokens, device=device)
        arguments = {
            "p_token_ids": segments.token_ids,
            "p_seg_start": segments.seg_start,
            "p_seg_slot": segments.seg_slot,
            "p_pass": segments.of_pass(index),
            "p_entry_scales": segments.scales,
            "p_slots": slots,
            "p_scales": scales,
            "BLOCK": SLOT_BLOCK,
            "num_warps": 1,
        }
        Launch(kernels_of(__name__).slots_kernel, (segments.capacity.segments_per_pass,), arguments)()
        owners.append(Owners(slots, scales))
    return owners


def capacity_of(step: SegmentCapacity, pairs: int, num_experts: int, slots: int) -> SegmentCapacity:
    """Return what the pairs of one pass need; ``slots`` is how many there are by the numbers that `fill` gives.

    Of each expert, places of the base come before those of all adapters, and those of padding behind them.
    """
    active = (step.distinct + 2) * num_experts
    return SegmentCapacity(pairs, slots, step.tile, scaled=step.scaled, active=active)


def fill(segments: Segments, pairs: ByExpert, owners: Owners, *, slot_stride: int, expert_stride: int) -> None:
    """Make the segments of a layer's pairs; an expert of a slot has the number that the strides say.

    Args:
        segments: of `capacity_of` so many pairs.
        pairs: those of the layer.
        owners: of a pass.
        slot_stride: from a slot's first expert to the next slot's.
        expert_stride: from an expert to the next.
    """
    places = {
        "p_tokens": pairs.tokens,
        "p_experts": pairs.experts,
        "p_slots": owners.slots,
        "P": len(pairs.tokens),
        "TILE": segments.capacity.tile,
        "BLOCK_P": SORT_BLOCK,
        "SPAN": SPAN,
        "num_warps": SORT_WARPS,
    }
    spans, counts = -(-len(pairs.tokens) // SPAN), None
    if spans > 1:
        counts = torch.empty(spans, dtype=torch.int32, device=pairs.tokens.device)
        Launch(kernels_of(__name__).starts_kernel, (spans,), {**places, "p_counts": counts})()
    arguments = {
        **places,
        "p_scales": owners.scales,
        "p_counts": counts,
        "p_token_ids": segments.token_ids,
        "p_seg_start": segments.seg_start,
        "p_seg_slot": segments.seg_slot,
        "p_place_scales": segments.scales,
        "p_pass_start": segments.pass_start,
        "slot_stride": slot_stride,
        "expert_stride": expert_stride,
    }
    Launch(kernels_of(__name__).segments_kernel, (spans,), arguments)()
