"""Where the memory goes: weights, adapters, what steps need, and key-value blocks from what is left."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

import psutil
import structlog
import torch

from inference_service.engine.graph_runner import buckets
from inference_service.models.decoder import Decoder
from loramux_shared.bases.config import ModelConfig
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()

KV_SHARE: Final = {"cpu": 0.25, "cuda": 0.92}
"""Without kv_memory_gb, the part of what is left that the cache takes: on a GPU the rest is for fragments."""
MAX_CPU_KV_BYTES: Final = 4 * 10**9
"""And on a CPU no more than that."""
GRAPH_BYTES: Final = 8 * 2**20
"""What a CUDA graph of a few hundred launches takes beside its tensors. Reasoned, not measured."""
GB: Final = 1e9


@dataclass(frozen=True)
class Needs:
    """What a replica holds beside its cache, in bytes."""

    weights: int
    """Of the base; loaded before the rest is planned, as the adapters are."""
    adapters: int
    activations: int
    """The widest moment of the largest step."""
    graphs: int
    """Recorded steps, and the tensors that they share; 0 without graphs."""


@dataclass(frozen=True)
class Cache:
    """What the cache is asked to hold."""

    token_bytes: int
    """Keys and values of a token, of all layers."""
    block_size: int
    longest: int
    """Tokens of the longest sequence that may be asked for."""
    most: int
    """Tokens of all sequences that are served at once."""
    whole: bool
    """Whether a sequence of the longest kind must fit, rather than be cut to what does."""
    kv_bytes: int | None = None
    """Its size, where the settings say it."""


@dataclass(frozen=True)
class Plan:
    """What fits."""

    num_blocks: int
    max_seq_len: int
    kv_bytes: int


def plan_memory(free: int, needs: Needs, cache: Cache, *, share: float, ceiling: int | None = None) -> Plan:
    """Divide the bytes that are free once weights and adapters are loaded.

    The cache takes what the settings say, or a share of what steps leave, ceiling at most; never more than all
    sequences can use.

    Raises:
        ResourcesExhausted: steps, or a cache of that size, or one sequence, do not fit.
    """
    steps = needs.activations + needs.graphs
    left = free - steps
    budget = int(share * max(0, left)) if ceiling is None else min(int(share * max(0, left)), ceiling)
    budget = min(budget if cache.kv_bytes is None else cache.kv_bytes, cache.most * cache.token_bytes)
    if left <= 0 or budget > left:
        raise ResourcesExhausted(
            f"beside {_shown(needs)}, {free / GB:.2f} GB are free; steps need {steps / GB:.2f} GB and the "
            f"key-value cache {budget / GB:.2f} GB. Lower LORAMUX_KV_MEMORY_GB, LORAMUX_MAX_BATCH_TOKENS or "
            "LORAMUX_MAX_BATCH_SEQS, or serve fewer adapters."
        )
    num_blocks = budget // cache.token_bytes // cache.block_size
    capacity = num_blocks * cache.block_size
    if capacity < min(cache.longest, 2 * cache.block_size) or (cache.whole and capacity < cache.longest):
        raise ResourcesExhausted(
            f"the key-value cache holds {capacity} tokens ({budget / GB:.2f} GB at {cache.token_bytes} bytes a "
            f"token, beside {_shown(needs)}), and one sequence of max_seq_len={cache.longest} does not fit. "
            "Raise LORAMUX_KV_MEMORY_GB or lower max_seq_len."
        )
    return Plan(num_blocks, min(cache.longest, capacity), capacity * cache.token_bytes)


def needs_of(
    config: ModelConfig, dtype: torch.dtype, adapters: int, settings: InferenceSettings, *, graphs: bool
) -> Needs:
    """Count what a model needs; adapters is what its adapters take, in bytes."""
    dims, size = config.dims, dtype.itemsize
    linears = sum(group.in_features * sum(group.out_features) for group in config.groups)
    embeddings = dims.vocab * dims.hidden * (1 if config.tied_embeddings else 2)
    widest = max(2 * group.in_features + 2 * sum(group.out_features) for group in config.groups)
    row = size * (2 * dims.hidden + widest)
    # A sampled row's logits are there once more in float32 when log probabilities are asked for.
    logits = settings.max_batch_seqs * dims.vocab
    num_graphs = 2 * len(list(buckets(settings.max_batch_seqs)))
    recorded = num_graphs * GRAPH_BYTES + settings.max_batch_seqs * row + 2 * logits * size
    return Needs(
        weights=size * (dims.num_layers * linears + embeddings),
        adapters=adapters,
        activations=settings.max_batch_tokens * row + logits * (size + 8),
        graphs=recorded if graphs else 0,
    )


def divide_memory(
    settings: InferenceSettings, max_seq_len: int | None, model: Decoder, adapters: int, *, graphs: bool
) -> Plan:
    """Plan the memory of a model that is loaded, adapters' bytes included, and log a line per item.

    Raises:
        ResourcesExhausted: it does not fit.
    """
    config, dims, device = model.config, model.config.dims, model.device
    longest = min(max_seq_len or config.max_positions, config.max_positions)
    cache = Cache(
        token_bytes=2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * model.dtype.itemsize,
        block_size=settings.block_size,
        longest=longest,
        most=settings.max_batch_seqs * longest,
        whole=max_seq_len is not None,
        kv_bytes=int(settings.kv_memory_gb * GB) if settings.kv_memory_gb else None,
    )
    needs, free = needs_of(config, model.dtype, adapters, settings, graphs=graphs), _free_bytes(device)
    ceiling = MAX_CPU_KV_BYTES if device.type == "cpu" else None
    plan = plan_memory(free, needs, cache, share=KV_SHARE[device.type], ceiling=ceiling)
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


def _shown(needs: Needs) -> str:
    return f"{needs.weights / GB:.2f} GB of weights and {needs.adapters / GB:.2f} GB of adapters"
