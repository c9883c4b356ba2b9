"""``GET /loads`` and ``GET /v1/loads``: the load of a replica, in SGLang's words."""

from datetime import UTC, datetime
from importlib.metadata import version

from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.api.http.wire.reply import Reply
from inference_service.api.requests.service import GenerationService


class RankLoad(TypedDict):
    """The load of the replica."""

    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    cache_hit_rate: float
    utilization: float
    max_running_requests: int


class Loads(TypedDict):
    """The load of each rank, of which there is one."""

    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[RankLoad]


async def show_loads(service: GenerationService, http: HttpRequest) -> Reply[Loads]:  # noqa: ARG001
    """Return how full the replica is, in SGLang's words; it is one rank of one."""
    stats = service.local.engine.stats
    total = stats.blocks_total * stats.block_size
    used = total - stats.blocks_free * stats.block_size
    load: RankLoad = {
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
    return Reply({"timestamp": now, "version": version("loramux"), "dp_rank_count": 1, "loads": [load]})
