"""Adapters of experts, for the SGMV kernels: an expert of an adapter is an adapter of its own.

Which expert has which token is known on the device alone, so the segments of a layer are made there. They hold
all places: those of the base belong to a slot that nobody has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inference_service.kernels.experts.layout import ByExpert
from inference_service.kernels.experts.tuning import SLOT_BLOCK, SORT_BLOCK, SORT_WARPS
from inference_service.kernels.launch import Launch
from inference_service.kernels.sgmv import SegmentCapacity, Segments
from inference_service.kernels.sgmv.layout import COUNTER_STRIDE


def slots_of(segments: Segments, tokens: int, nobody: int) -> Tensor:
    """Return the slot of each of so many tokens, int32 [T], for a step's segments; the base's have nobody's."""
    device = segments.packed.device
    slots = torch.full((tokens,), nobody, dtype=torch.int32, device=device)
    arguments = {
        "p_token_ids": segments.token_ids,
        "p_seg_start": segments.seg_start,
        "p_seg_slot": segments.seg_slot,
        "p_end": segments.pass_start[-2:],
        "p_slots": slots,
        "BLOCK": SLOT_BLOCK,
        "num_warps": 1,
    }
    Launch(_kernels().slots_kernel, (segments.capacity.segments,), arguments)()
    return slots


def capacity_of(step: SegmentCapacity, pairs: int, num_experts: int, slots: int) -> SegmentCapacity:
    """Return what the pairs of a step need; ``slots`` is how many there are by the numbers that `fill` gives.

    Of each expert, places of the base come before those of all adapters, and those of padding behind them.
    """
    return SegmentCapacity(pairs, slots, step.tile, active=(step.distinct + 2) * num_experts)


def allocate(capacity: SegmentCapacity, device: torch.device) -> Segments:
    """Return buffers that `fill` fills."""
    packed = torch.empty(capacity.packed_size, dtype=torch.int32, device=device)
    views = {name: packed[where] for name, where in capacity.sections.items() if name != "scales"}
    counters = torch.zeros(capacity.segments_per_pass, COUNTER_STRIDE, dtype=torch.int32, device=device)
    return Segments(capacity, packed, scales=None, counters=counters, **views)


def fill(segments: Segments, pairs: ByExpert, slots: Tensor, *, slot_stride: int, expert_stride: int) -> None:
    """Make the segments of a layer's pairs; an expert of a slot has the number that the strides say.

    Args:
        segments: of `capacity_of` so many pairs.
        pairs: those of the layer.
        slots: int32 [T], of `slots_of`.
        slot_stride: from a slot's first expert to the next slot's.
        expert_stride: from an expert to the next.
    """
    arguments = {
        "p_tokens": pairs.tokens,
        "p_experts": pairs.experts,
        "p_slots": slots,
        "p_token_ids": segments.token_ids,
        "p_seg_start": segments.seg_start,
        "p_seg_slot": segments.seg_slot,
        "p_pass_start": segments.pass_start,
        "P": len(pairs.tokens),
        "slot_stride": slot_stride,
        "expert_stride": expert_stride,
        "TILE": segments.capacity.tile,
        "BLOCK_P": SORT_BLOCK,
        "num_warps": SORT_WARPS,
    }
    Launch(_kernels().segments_kernel, (1,), arguments)()


def _kernels() -> Any:
    """The module of kernels: imported here, for machines without a GPU need no Triton."""
    from inference_service.kernels.experts import triton_kernels

    return triton_kernels
