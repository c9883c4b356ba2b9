"""What trainers ask of a server beside answers, as vLLM has it: who it is, and to stand still for a moment."""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.http import answers
from inference_service.http.admin.operators import manager_of, refuse_other_sites
from inference_service.http.wire.body import Query, read_query
from inference_service.http.wire.reply import json_response
from inference_service.serving.engine_thread import PauseMode
from inference_service.serving.service import GenerationService


class InfoQuery(Query):
    """In which form the configuration is told."""

    config_format: Literal["json"] = "json"


class PauseQuery(Query):
    """What becomes of requests under way; vLLM ends them where nothing is said."""

    mode: PauseMode | None = None
    wait_for_inflight_requests: bool = False
    """An older word for the mode wait; the mode comes before it."""
    clear_cache: bool = True
    """Accepted: cached prompts belong to a version, and are never met by another."""

    @property
    def said(self) -> PauseMode:
        """The mode."""
        return self.mode or (PauseMode.WAIT if self.wait_for_inflight_requests else PauseMode.ABORT)


async def get_world_size(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say how many devices share the model: one."""
    body: answers.WorldSize = {"world_size": 1}
    return json_response(body)


async def server_info(service: GenerationService, http: HttpRequest) -> Response:
    """Describe the model as vLLM's configuration does, as far as trainers read it."""
    read_query(http, InfoQuery)
    facts, stats = manager_of(http).facts, service.engine_view.stats
    config: answers.VllmConfig = {
        "model_config": {
            "model": service.catalog.base_name,
            "dtype": facts.dtype or None,
            "max_model_len": service.limits.max_seq_len,
            "logprobs_mode": f"{service.logprobs_mode}_logprobs",
        },
        "parallel_config": {"world_size": 1, "tensor_parallel_size": 1, "data_parallel_size": 1},
        "lora_config": {"max_loras": stats.max_adapters, "max_lora_rank": facts.max_lora_rank or None},
    }
    body: answers.ServerInfo = {"vllm_config": config}
    return json_response(body)


async def pause(service: GenerationService, http: HttpRequest) -> Response:
    """Let requests stand still (mode keep), end them (abort) or let them end (wait); new ones wait."""
    refuse_other_sites(http)
    await service.engine_view.pause(read_query(http, PauseQuery).said)
    body: answers.PauseStatus = {"status": "paused"}
    return json_response(body)


async def resume(service: GenerationService, http: HttpRequest) -> Response:
    """Go on with everything that stands still or waits."""
    refuse_other_sites(http)
    service.engine_view.resume()
    body: answers.PauseStatus = {"status": "resumed"}
    return json_response(body)


async def is_paused(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say whether requests stand still."""
    body: answers.IsPaused = {"is_paused": service.engine_view.paused}
    return json_response(body)
