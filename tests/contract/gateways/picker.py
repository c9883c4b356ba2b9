"""The endpoint picker's eyes and rules, written from llm-d-router's main of September 2026.

Sources, below pkg/epp/framework/plugins/: datalayer/extractor/metrics/{extractor,spec,factories}.go for what is
read of a scrape, and scheduling/scorer/{loraaffinity,loraloadstate,queuedepth,kvcacheutilization}/.
The picker of the gateway-api-inference-extension (v1) reads a part of it by the same rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

SCALE = 0.94
"""Share that the load-state scorer leaves of its tiers, for bonuses that never reorder them."""
Series = list[tuple[dict[str, str], float]]


@dataclass(frozen=True)
class Endpoint:
    """The picker's record of a replica."""

    waiting: int
    running: int
    kv_usage: float
    active: frozenset[str]
    queued: frozenset[str]
    loaded: Mapping[str, tuple[str, bool]]
    """Level of each adapter and whether it is pinned."""
    gpu_loaded: int
    slots: int
    base: str
    block_size: int
    blocks: int
    load_s: float
    """Mean of the loads so far."""


def read(text: str) -> Endpoint:
    """Read a scrape; a missing family of metrics raises KeyError, as the picker fails then."""
    families: dict[str, Series] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            families.setdefault(sample.name, []).append((sample.labels, sample.value))
    newest = max(families["vllm:lora_requests_info"], key=lambda each: each[1])[0]
    cache = families["vllm:cache_config_info"][0][0]
    loaded = {
        labels["adapter_name"]: (labels["level"], labels["pinned"] == "true")
        for labels, value in families.get("vllm:lora_adapter_loaded", [])
        if value
    }
    return Endpoint(
        waiting=int(families["vllm:num_requests_waiting"][0][1]),
        running=int(families["vllm:num_requests_running"][0][1]),
        kv_usage=families["vllm:kv_cache_usage_perc"][0][1],
        active=_names(newest["running_lora_adapters"]),
        queued=_names(newest["waiting_lora_adapters"]),
        loaded=loaded,
        gpu_loaded=int(max(value for _, value in families["vllm:num_gpu_loaded_lora_adapters"])),
        slots=int(max(value for _, value in families["vllm:max_gpu_lora_adapters"])),
        base=families["vllm:num_gpu_loaded_lora_adapters"][0][0]["model_name"],
        block_size=int(cache["block_size"]),
        blocks=int(cache["num_gpu_blocks"]),
        load_s=_mean_load(families),
    )


def _names(listed: str) -> frozenset[str]:
    return frozenset(filter(None, map(str.strip, listed.split(","))))


def _mean_load(families: Mapping[str, Series]) -> float:
    def of_loads(name: str) -> float:
        found = families[f"vllm:lora_adapter_load_seconds_{name}"]
        return sum(value for labels, value in found if labels["transition"] == "load")

    return of_loads("sum") / of_loads("count") if of_loads("count") else 0.0


def by_affinity(model: str, endpoint: Endpoint) -> float:
    """Score a replica by affinity: the adapter runs there, has room there, or waits there."""
    if model in endpoint.active:
        return 1.0
    if len(endpoint.active) + len(endpoint.queued) < endpoint.slots:
        return 0.8
    return 0.6 if model in endpoint.queued else 0.0


def by_load_state(model: str, endpoint: Endpoint) -> float:
    """Score a replica: in memory, on its way, room, one that could leave, nothing; the base goes where few
    adapters are.
    """
    if model == endpoint.base:
        return SCALE * max(endpoint.slots - endpoint.gpu_loaded, 0) / endpoint.slots
    level, _ = endpoint.loaded.get(model, ("", False))
    idle = any(
        where == "gpu" and not pinned and name not in endpoint.active
        for name, (where, pinned) in endpoint.loaded.items()
    )
    tiers = (
        (level == "gpu", 1.0),
        (bool(level), 0.7),
        (endpoint.gpu_loaded < endpoint.slots, 0.6),
        (idle, 0.3),
    )
    return SCALE * next((score for holds, score in tiers if holds), 0.0)


def pick(model: str, endpoints: Mapping[str, Endpoint]) -> str:
    """Return the replica with the highest sum: queue and cache with weight 2, adapters with 1."""
    queues = [each.waiting for each in endpoints.values()]
    span = max(queues) - min(queues)

    def score(endpoint: Endpoint) -> float:
        queue = (max(queues) - endpoint.waiting) / span if span else 1.0
        adapters = by_affinity(model, endpoint) + by_load_state(model, endpoint)
        return adapters + 2 * queue + 2 * (1 - endpoint.kv_usage)

    return max(endpoints, key=lambda name: score(endpoints[name]))
