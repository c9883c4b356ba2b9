"""``GET /v1/models``."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.served_model import ServedModel
from inference_service.chat.dialect import dialect_of_model
from inference_service.http import answers
from inference_service.http.admin.operators import failure_of, manager_of
from inference_service.http.wire.reply import json_response
from inference_service.serving.service import GenerationService

FEW: Final = 100
"""Models that are described at once."""


async def list_models(service: GenerationService, http: HttpRequest) -> Response:
    """List the base, where it is served, and the adapters."""
    models, adapters = list(service.catalog), manager_of(http)

    def write() -> Response:
        body: answers.ModelList = {
            "object": "list",
            "data": [_model(model, service, adapters) for model in models],
            "has_more": False,
            "first_id": models[0].name if models else None,
            "last_id": models[-1].name if models else None,
        }
        return json_response(body)

    # Of thousands it takes a while, in which others are served.
    return await asyncio.to_thread(write) if len(models) > FEW else write()


async def get_model(service: GenerationService, http: HttpRequest) -> Response:
    """Describe one model."""
    return json_response(_model(service.catalog.get(http.path_params["model"]), service, manager_of(http)))


def _model(model: ServedModel, service: GenerationService, adapters: AdapterManager) -> answers.Model:
    catalog = service.catalog
    base = model.name == catalog.base_name
    dialect = dialect_of_model(service, model)
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
        "tier": adapters.place_of(model).value,
        "ranks": list(model.ranks),
        "modules": list(model.modules),
        "kinds": list(model.kinds),
        "replaced_rows": dict(model.replaced),
        "invocation_tokens": list(model.invocation),
        "num_labels": model.num_labels,
        "licence": (catalog.base_licence if base else model.licence) or None,
        "base_licence": None if base else catalog.base_licence or None,
        "tool_parser": dialect.tool if dialect else None,
        "reasoning_parser": dialect.reasoning if dialect else None,
        "warnings": list(model.warnings),
        "last_failure": failure_of(adapters.failure_of(model)),
        "type": "model",
        "display_name": model.name,
        "created_at": model.load_time.isoformat(timespec="seconds"),
    }
