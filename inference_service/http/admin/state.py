"""What monitors and gateways ask: health, metrics, version, load, and ``/state``, which the page shows."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.http import answers
from inference_service.http.wire.reply import json_response
from inference_service.serving.service import GenerationService
from inference_service.serving.telemetry.metrics import CONTENT_TYPE
from inference_service.serving.telemetry.replica import loads


async def health(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say that requests are taken, and why they are computed slowly if so; a server that drains says 503.

    `front` does that, before anything gets here.
    """
    computing = service.catalog.computing
    body: answers.Health = {"status": "slow" if computing.lack else "ok", "backend": computing.backend}
    if computing.lack:
        body |= {"lack": computing.lack.value}
    return json_response(body)


async def show_metrics(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Answer Prometheus; written on a thread, so that a replica of many adapters goes on meanwhile."""
    body = await asyncio.to_thread(service.metrics.render)
    return Response(body, headers={"content-type": CONTENT_TYPE})


async def show_version(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say which loramux this is."""
    body: answers.Version = {"version": version("loramux")}
    return json_response(body)


async def show_state(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Tell the load of the whole server, and which of the caller's models have sequences."""
    stats = service.engine_view.stats
    body: answers.State = {
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_blocks": {"used": stats.blocks_total - stats.blocks_free, "total": stats.blocks_total},
        "prefix_tokens": {"hit": stats.prefix_tokens_hit, "queried": stats.prefix_tokens_queried},
        "generated_tokens": stats.tokens_generated,
        "models": _at_work(service),
    }
    return json_response(body)


async def show_load(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Tell how many requests are in work, in vLLM's words."""
    body: answers.Load = {"server_load": service.in_work}
    return json_response(body)


async def show_loads(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Tell how full the replica is, in SGLang's words; it is one rank of one."""
    return json_response(loads(service.engine_view))


def _at_work(service: GenerationService) -> dict[str, answers.AtWork]:
    sequences = service.engine_view.sequence_counts
    found: dict[str, answers.AtWork] = {}
    for model in service.catalog:
        name = model.name
        counts: answers.AtWork = {
            "running": sequences.running.get(name, 0),
            "waiting": sequences.waiting.get(name, 0),
        }
        if any(counts.values()):
            found[model.name] = counts
    return found
