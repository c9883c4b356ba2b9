"""What a replica's device has free, divided as `loramux_shared.bases.memory` plans it."""

from __future__ import annotations

from dataclasses import asdict

import psutil
import structlog
import torch

from inference_service.models.decoder import Decoder
from loramux_shared.bases.memory import GB, MemoryPlan, cache_of, needs_of, plan_on
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()


def divide_memory(
    settings: InferenceSettings, max_seq_len: int | None, model: Decoder, adapters: int, *, graphs: bool
) -> MemoryPlan:
    """Plan the memory of a model that is loaded, adapters' bytes included, and log a line per item.

    Raises:
        ResourcesExhausted: it does not fit.
    """
    config, item_bytes, device = model.config, model.dtype.itemsize, model.device
    needs = needs_of(config, item_bytes, adapters, settings, graphs=graphs)
    free = _free_bytes(device)
    plan = plan_on(device.type, free, needs, cache_of(config, item_bytes, settings, max_seq_len))
    left = free - needs.activations - needs.graphs - plan.kv_bytes
    for item, size in {**asdict(needs), "key-value cache": plan.kv_bytes, "left": left}.items():
        log.info("memory", item=item, gb=round(size / GB, 3))
    return plan


def _free_bytes(device: torch.device) -> int:
    """Bytes of the device, or of the machine, that nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
