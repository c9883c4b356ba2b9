"""The load of a replica, in SGLang's words: for gateways, over HTTP and gRPC."""

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final

from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.http.endpoint import Endpoint
from inference_service.http.wire.reply import Reply
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.service import GenerationService
from loramux_shared import routes


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


def loads(engine: EngineThread) -> Loads:
    """Return the load of a replica, which is one rank of one, in SGLang's words."""
    stats = engine.stats
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
    return {"timestamp": now, "version": version("loramux"), "dp_rank_count": 1, "loads": [load]}


async def show_loads(service: GenerationService, http: HttpRequest) -> Reply[Loads]:  # noqa: ARG001
    """Return how full the replica is, in SGLang's words; it is one rank of one."""
    return Reply(loads(service.engine))


ROUTES: Final = tuple(Endpoint(route, show_loads) for route in (routes.LOADS, routes.LOADS_V1))
"""The routes of this extension."""
