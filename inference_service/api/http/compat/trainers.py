"""Routes of trainers as vLLM has them: a pause, and the part of its configuration that they read."""

from typing import Literal

from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.api.http.admin.operators import manager_of, refuse_other_sites
from inference_service.api.http.wire.body import Query, read_query
from inference_service.api.http.wire.reply import Reply
from inference_service.api.requests.service import GenerationService
from inference_service.driver.engine_thread import PauseMode


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
    """The model's parallelism: that of tensors."""

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
    """Return the number of devices that share the model."""
    return Reply({"world_size": manager_of(http).facts.ranks})


async def server_info(service: GenerationService, http: HttpRequest) -> Reply[ServerInfo]:
    """Describe the model as vLLM's configuration does, as far as trainers read it."""
    read_query(http, InfoQuery)
    facts, stats = manager_of(http).facts, service.local.engine.stats
    config: VllmConfig = {
        "model_config": {
            "model": service.local.catalog.base_name,
            "dtype": facts.dtype or None,
            "max_model_len": service.limits.max_seq_len,
            "logprobs_mode": f"{service.logprobs_mode}_logprobs",
        },
        "parallel_config": {
            "world_size": facts.ranks,
            "tensor_parallel_size": facts.ranks,
            "data_parallel_size": 1,
        },
        "lora_config": {"max_loras": stats.max_adapters, "max_lora_rank": facts.max_lora_rank or None},
    }
    return Reply({"vllm_config": config})


async def pause(service: GenerationService, http: HttpRequest) -> Reply[PauseStatus]:
    """Pause requests (mode keep), end them (abort) or let them end (wait); new ones wait."""
    refuse_other_sites(http)
    await service.local.engine.pause(read_query(http, PauseQuery).pause_mode)
    return Reply({"status": "paused"})


async def resume(service: GenerationService, http: HttpRequest) -> Reply[PauseStatus]:
    """Resume all paused and waiting requests."""
    refuse_other_sites(http)
    service.local.engine.resume()
    return Reply({"status": "resumed"})


async def is_paused(service: GenerationService, http: HttpRequest) -> Reply[IsPaused]:  # noqa: ARG001
    """Return whether requests are paused."""
    return Reply({"is_paused": service.local.engine.paused})
