"""``GET /v1/models``, and what monitors ask."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.openai_api.reply import Json, json_response
from inference_service.serving.catalog import ServedModel
from inference_service.serving.service import GenerationService
from inference_service.serving.telemetry.metrics import CONTENT_TYPE
from loramux_shared.faults import Finding, RequestInvalid


async def list_models(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """List the base, where it is served, and the adapters."""
    return json_response({"object": "list", "data": [_model(model, service) for model in service.catalog]})


async def get_model(service: GenerationService, http: HttpRequest) -> Response:
    """Describe one model."""
    return json_response(_model(service.catalog.get(http.path_params["model"]), service))


def _model(model: ServedModel, service: GenerationService) -> Json:
    catalog = service.catalog
    base = model.name == catalog.base_name
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.load_time.timestamp()),
        "owned_by": "loramux",
        "root": model.source,
        "parent": None if base else catalog.base_name,
        "max_model_len": service.limits.max_seq_len,
        "generation": catalog.generation,
        "digest": model.digest or None,
        "ranks": list(model.ranks),
        "modules": list(model.modules),
        "warnings": list(model.warnings),
    }


async def health(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say that requests are taken; a server that drains answers 503 before it gets here."""
    return Response()


async def show_metrics(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Answer Prometheus; written on a thread, so that a replica of many adapters goes on meanwhile."""
    body = await asyncio.to_thread(service.metrics.render)
    return Response(body, headers={"content-type": CONTENT_TYPE})


async def show_version(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Say which loramux this is."""
    return json_response({"version": version("loramux")})


async def embeddings(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Refuse: this server generates text."""
    finding = Finding(code="E_UNSUPPORTED", fix="Ask a server of an embedding model.")
    raise RequestInvalid("this server generates text, and makes no embeddings.", [finding])
