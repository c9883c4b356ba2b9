"""Routes for monitors, gateways and trainers: health, metrics, version, load, a description, and a pause.

`/state` is what the page shows; the routes of trainers are as vLLM has them.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Literal, NotRequired

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from typing_extensions import TypedDict

from inference_service.http.admin.operators import manager_of, refuse_other_sites
from inference_service.http.wire.body import Query, read_query
from inference_service.http.wire.reply import Reply
from inference_service.serving.engine_thread import PauseMode
from inference_service.serving.service import GenerationService
from inference_service.serving.telemetry.metrics import CONTENT_TYPE
from inference_service.serving.telemetry.replica import Loads, loads


class Version(TypedDict):
    """The version of loramux."""

    version: str


class Health(TypedDict):
    """The server accepts requests; ``slow`` if torch's operations replace compiled ones."""

    status: Literal["ok", "slow"]
    backend: str
    lack: NotRequired[str]
    """Why: ``no_compiler``, ``not_compiled``, ``wrong_result`` or ``unsupported``."""


class Blocks(TypedDict):
    """Cache blocks."""

    used: int
    total: int


class PrefixTokens(TypedDict):
    """Tokens of prompts, since the start: found in the cache, and looked for there."""

    hit: int
    queried: int


class AtWork(TypedDict):
    """Sequences of a model."""

    running: int
    waiting: int


class State(TypedDict):
    """The load of the whole server, and which of the caller's models have sequences."""

    running: int
    waiting: int
    kv_blocks: Blocks
    prefix_tokens: PrefixTokens
    generated_tokens: int
    models: dict[str, AtWork]


class Load(TypedDict):
    """Requests in work."""

    server_load: int


async def health(service: GenerationService, http: HttpRequest) -> Reply[Health]:  # noqa: ARG001
    """Return 200 while requests are accepted, and why they are slow if so; 503 while the server drains.

    `front` does that, before anything gets here.
    """
    computing = service.adapters.facts.computing
    body: Health = {"status": "slow" if computing.lack else "ok", "backend": computing.backend}
    if computing.lack:
        body |= {"lack": computing.lack.value}
    return Reply(body)


async def show_metrics(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Return the metrics in Prometheus' format; a thread writes them, so that requests do not wait."""
    body = await asyncio.to_thread(service.metrics.render)
    return Response(body, headers={"content-type": CONTENT_TYPE})


async def show_version(service: GenerationService, http: HttpRequest) -> Reply[Version]:  # noqa: ARG001
    """Return the version of loramux."""
    return Reply({"version": version("loramux")})


async def show_state(service: GenerationService, http: HttpRequest) -> Reply[State]:  # noqa: ARG001
    """Return the load of the whole server, and the caller's models that have sequences."""
    stats = service.engine.stats
    return Reply(
        {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_blocks": {"used": stats.blocks_total - stats.blocks_free, "total": stats.blocks_total},
            "prefix_tokens": {"hit": stats.prefix_tokens_hit, "queried": stats.prefix_tokens_queried},
            "generated_tokens": stats.tokens_generated,
            "models": _at_work(service),
        }
    )


async def show_load(service: GenerationService, http: HttpRequest) -> Reply[Load]:  # noqa: ARG001
    """Return the number of running requests, in vLLM's words."""
    return Reply({"server_load": service.in_work})


async def show_loads(service: GenerationService, http: HttpRequest) -> Reply[Loads]:  # noqa: ARG001
    """Return how full the replica is, in SGLang's words; it is one rank of one."""
    return Reply(loads(service.engine))


def _at_work(service: GenerationService) -> dict[str, AtWork]:
    sequences = service.engine.sequence_counts
    found: dict[str, AtWork] = {}
    for model in service.catalog:
        name = model.name
        counts: AtWork = {
            "running": sequences.running.get(name, 0),
            "waiting": sequences.waiting.get(name, 0),
        }
        if any(counts.values()):
            found[model.name] = counts
    return found


class InfoQuery(Query):
    """The form of the configuration."""

    config_format: Literal["json"] = "json"


class PauseQuery(Query):
    """The fate of requests under way in a pause; vLLM ends them by default."""

    mode: PauseMode | None = None
    wait_for_inflight_requests: bool = False
    """An older word for the mode wait; the mode comes before it."""
    clear_cache: bool = True
    """Accepted: the prefix cache is kept per version of an adapter, so it needs no flush."""

    @property
    def pause_mode(self) -> PauseMode:
        """The mode."""
        return self.mode or (PauseMode.WAIT if self.wait_for_inflight_requests else PauseMode.ABORT)


class PauseStatus(TypedDict):
    """The result of a pause or a resume."""

    status: Literal["paused", "resumed"]


class IsPaused(TypedDict):
    """True while requests stand still."""

    is_paused: bool


class WorldSize(TypedDict):
    """The number of devices that share the model."""

    world_size: int


class ModelConfig(TypedDict):
    """The model as vLLM describes one."""

    model: str
    dtype: str | None
    max_model_len: int
    logprobs_mode: str


class ParallelConfig(TypedDict):
    """The model's parallelism: none."""

    world_size: int
    tensor_parallel_size: int
    data_parallel_size: int


class LoraConfig(TypedDict):
    """Adapters of one step, and the largest rank."""

    max_loras: int
    max_lora_rank: int | None


class VllmConfig(TypedDict):
    """The part of vLLM's configuration that trainers read."""

    model_config: ModelConfig
    parallel_config: ParallelConfig
    lora_config: LoraConfig


class ServerInfo(TypedDict):
    """The configuration, under vLLM's name for it."""

    vllm_config: VllmConfig


async def get_world_size(service: GenerationService, http: HttpRequest) -> Reply[WorldSize]:  # noqa: ARG001
    """Return the number of devices that share the model: one."""
    return Reply({"world_size": 1})


async def server_info(service: GenerationService, http: HttpRequest) -> Reply[ServerInfo]:
    """Describe the model as vLLM's configuration does, as far as trainers read it."""
    read_query(http, InfoQuery)
    facts, stats = manager_of(http).facts, service.engine.stats
    config: VllmConfig = {
        "model_config": {
            "model": service.catalog.base_name,
            "dtype": facts.dtype or None,
            "max_model_len": service.limits.max_seq_len,
            "logprobs_mode": f"{service.logprobs_mode}_logprobs",
        },
        "parallel_config": {"world_size": 1, "tensor_parallel_size": 1, "data_parallel_size": 1},
        "lora_config": {"max_loras": stats.max_adapters, "max_lora_rank": facts.max_lora_rank or None},
    }
    return Reply({"vllm_config": config})


async def pause(service: GenerationService, http: HttpRequest) -> Reply[PauseStatus]:
    """Pause requests (mode keep), end them (abort) or let them end (wait); new ones wait."""
    refuse_other_sites(http)
    await service.engine.pause(read_query(http, PauseQuery).pause_mode)
    return Reply({"status": "paused"})


async def resume(service: GenerationService, http: HttpRequest) -> Reply[PauseStatus]:
    """Resume all paused and waiting requests."""
    refuse_other_sites(http)
    service.engine.resume()
    return Reply({"status": "resumed"})


async def is_paused(service: GenerationService, http: HttpRequest) -> Reply[IsPaused]:  # noqa: ARG001
    """Return whether requests are paused."""
    return Reply({"is_paused": service.engine.paused})
