"""What trainers ask of a server beside answers, as vLLM has it: who it is, and to stand still for a moment."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.openai_api.operators import manager_of, refuse_other_sites
from inference_service.openai_api.reply import json_response
from inference_service.serving.pausing import PauseMode
from inference_service.serving.service import GenerationService
from loramux_shared.faults import Finding, RequestInvalid


async def get_world_size(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say how many devices share the model: one."""
    return json_response({"world_size": 1})


async def server_info(service: GenerationService, http: HttpRequest) -> Response:
    """Describe the model as vLLM's configuration does, as far as trainers read it."""
    config_format = http.query_params.get("config_format", "json")
    if config_format != "json":
        finding = Finding(
            code="E_BAD_FIELD", where="config_format", expected="json", found=repr(config_format[:20])
        )
        raise RequestInvalid("the configuration is told as JSON alone.", [finding])
    facts, stats = manager_of(http).facts, service.engine_view.stats
    config = {
        "model_config": {
            "model": service.catalog.base_name,
            "dtype": facts.dtype or None,
            "max_model_len": service.limits.max_seq_len,
            "logprobs_mode": f"{service.logprobs_mode}_logprobs",
        },
        "parallel_config": {"world_size": 1, "tensor_parallel_size": 1, "data_parallel_size": 1},
        "lora_config": {"max_loras": stats.max_adapters, "max_lora_rank": facts.max_lora_rank or None},
    }
    return json_response({"vllm_config": config})


async def pause(service: GenerationService, http: HttpRequest) -> Response:
    """Let requests stand still (mode keep), end them (abort) or let them end (wait); new ones wait."""
    refuse_other_sites(http)
    await service.engine_view.pause(_mode(http))
    return json_response({"status": "paused"})


async def resume(service: GenerationService, http: HttpRequest) -> Response:
    """Go on with everything that stands still or waits."""
    refuse_other_sites(http)
    service.engine_view.resume()
    return json_response({"status": "resumed"})


async def is_paused(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say whether requests stand still."""
    return json_response({"is_paused": service.engine_view.paused})


def _mode(http: HttpRequest) -> PauseMode:
    """Return what becomes of requests under way; vLLM ends them where nothing is said."""
    waits = http.query_params.get("wait_for_inflight_requests", "").lower() in ("true", "1")
    said = http.query_params.get("mode", "wait" if waits else "abort")
    try:
        return PauseMode(said)
    except ValueError:
        finding = Finding(
            code="E_BAD_FIELD", where="mode", expected="keep, abort or wait", found=repr(said[:20])
        )
        raise RequestInvalid("the server cannot pause in that way.", [finding]) from None
