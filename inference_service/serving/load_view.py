"""How full a replica is, in the words of SGLang and of SMG."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from inference_service.serving.telemetry.replica import EngineView


def loads(engine: EngineView) -> dict[str, Any]:
    """Return the load of a replica, which is one rank of one: when, who, and numbers by name."""
    stats = engine.stats
    total = stats.blocks_total * stats.block_size
    used = total - stats.blocks_free * stats.block_size
    load = {
        "dp_rank": 0,
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "num_total_reqs": stats.running + stats.waiting,
        "num_used_tokens": used,
        "max_total_num_tokens": total,
        "token_usage": used / total,
        "cache_hit_rate": stats.prefix_hit_rate,
        "utilization": stats.running / max(1, stats.seats),
        "max_running_requests": stats.seats,
    }
    now = datetime.now(UTC).isoformat()
    return {"timestamp": now, "version": version("loramux"), "dp_rank_count": 1, "loads": [load]}
