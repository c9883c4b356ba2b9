"""A bank for adapters that stay: for tests, benchmarks, and servers of a fixed set."""

from __future__ import annotations

from collections.abc import Sequence

from inference_service.backends.base import LoraBackend
from inference_service.lora.packed import PackedAdapter
from inference_service.lora.places import taken_by
from inference_service.lora.weights import AdapterWeights


def hold(lora: LoraBackend, *weights: AdapterWeights) -> list[int]:
    """Open a bank that is just large enough for adapters, and bring them in; return their slots."""
    return hold_packed(lora, [lora.pack(each) for each in weights])


def hold_packed(lora: LoraBackend, packed: Sequence[PackedAdapter], max_rank: int = 1) -> list[int]:
    """The same of adapters that are packed; the bank is opened for their largest rank, or for max_rank."""
    num_bytes = sum(taken_by(each.num_bytes) for each in packed)
    lora.open(num_bytes, max([max_rank, *(each.max_rank for each in packed)]), len(packed))
    offset = 0
    for slot, each in enumerate(packed):
        lora.copy(each, offset)
        lora.enter(slot, offset, each)
        offset += taken_by(each.num_bytes)
    return list(range(len(packed)))
