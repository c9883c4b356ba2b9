"""The free memory of a replica's device, divided as `loramux_shared.bases.memory` plans it.

On a GPU the arithmetic is a forecast: what steps take is measured before the cache gets its size. On a CPU it
is the plan. There the cache takes a quarter of what is free at most, its pages come when they are written, and
the most that a process had cannot be asked for one step alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Final

import psutil
import structlog
import torch

from inference_service.engine.block_manager import BlockManager
from inference_service.engine.state_slots import StateSlots
from inference_service.models.decoder import Decoder
from inference_service.startup.profile import CudaMemory, Measured
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import GB, MemoryPlan, cache_of, needs_of, plan_on
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()


def divide_memory(
    settings: InferenceSettings,
    max_seq_len: int | None,
    model: Decoder,
    adapters: int,
    *,
    promised: int = 0,
    graphs: bool,
    measure: Callable[[int], Measured] | None = None,
) -> MemoryPlan:
    """Plan the memory of a model that is loaded, adapters' bytes included, and log a line per item.

    promised are bytes that will be taken and are not yet; adapters' memory on a CPU comes when it is written.
    measure runs the largest step, with contexts of so many tokens; without it, arithmetic must do.

    Raises:
        ResourcesExhausted: it does not fit.
    """
    config, item_bytes, device = model.config, model.dtype.itemsize, model.device
    free = free_bytes(device) - promised
    needs = needs_of(config, item_bytes, adapters, settings, device.type, graphs=graphs)
    cache = cache_of(config, item_bytes, settings, device.type, max_seq_len)
    forecast: dict[str, int] = {}
    libraries = 0
    if measure is not None:
        forecast = {"activations": needs.activations, "graphs": needs.graphs, "libraries": 0}
        measured = measure(cache.longest)
        counted = needs_of(
            config, item_bytes, adapters, settings, device.type, graphs=graphs, graph_bytes=measured.graph
        )
        needs = replace(needs, activations=measured.steps, graphs=counted.graphs)
        free, libraries = measured.free, measured.kept
    plan = plan_on(device.type, free, needs, cache)
    if plan.seqs < cache.seqs:
        log.info(
            "fewer sequences run at once, since each holds a recurrent state", seats=plan.seqs, usual=cache.seqs
        )
    left = free - needs.activations - needs.graphs - plan.kv_bytes
    items = {**asdict(needs), "libraries": libraries, "key-value cache": plan.kv_bytes, "left": left}
    for item, size in items.items():
        planned = {"planned_gb": round(forecast[item] / GB, 3)} if item in forecast else {}
        log.info("memory", item=item, gb=round(size / GB, 3), **planned)
    return plan


def blocks_of(plan: MemoryPlan, config: ModelConfig, settings: InferenceSettings) -> BlockManager:
    """Return the blocks and slots that were planned, all of them free."""
    size = settings.block_size
    states = StateSlots(plan.slots, size, plan.spacing) if plan.slots else None
    cached = settings.prefix_cache
    return BlockManager(plan.blocks, size, config.windows, states=states, prefix_cache=cached)


def free_bytes(device: torch.device) -> int:
    """Free bytes of the device, or of the machine."""
    if device.type == "cuda":
        return CudaMemory(device).settled()
    return int(psutil.virtual_memory().available)


_M_ARENA_MAX: Final = -8
"""Option of mallopt, from malloc.h."""
ARENAS: Final = 2
"""glibc's own is eight for each core: each thread of a load would keep in its own what it freed."""


def bound_arenas() -> None:
    """Let all threads allocate from few arenas; to be called before there are many threads."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Return to the system what was freed, of all arenas."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
