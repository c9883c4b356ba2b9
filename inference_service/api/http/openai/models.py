"""``GET /v1/models``."""

import asyncio
from typing import Final, Literal

from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.adapters.manager import AdapterManager
from inference_service.api.chat.dialect import dialect_of_model
from inference_service.api.http.admin.operators import Failure, failure_of, manager_of
from inference_service.api.http.wire.reply import Reply
from inference_service.api.requests.service import GenerationService
from inference_service.core.served_model import ServedModel

FEW: Final = 100
"""Models that are described at once."""


class Model(TypedDict):
    """The base, whose parent is null, or an adapter of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    generation: int
    digest: str | None
    tier: Literal["store", "host", "device"]
    ranks: list[int]
    modules: list[str]
    kinds: list[str]
    replaced_rows: dict[str, int]
    invocation_tokens: list[int]
    num_labels: int | None
    licence: str | None
    base_licence: str | None
    tool_parser: str | None
    reasoning_parser: str | None
    warnings: list[str]
    last_failure: Failure | None
    type: Literal["model"]
    """This and what follows are Anthropic's."""
    display_name: str
    created_at: str


class ModelList(TypedDict):
    """The models that the caller's key may use."""

    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    """Anthropic's, as the ids of the first and the last."""
    first_id: str | None
    last_id: str | None


async def list_models(service: GenerationService, http: HttpRequest) -> Reply[ModelList]:
    """List the base, where it is served, and the adapters."""
    models, adapters = list(service.local.catalog), manager_of(http)

    def write() -> Reply[ModelList]:
        return Reply(
            {
                "object": "list",
                "data": [_model(model, service, adapters) for model in models],
                "has_more": False,
                "first_id": models[0].name if models else None,
                "last_id": models[-1].name if models else None,
            }
        )

    # Thousands of models take a while: a thread writes them, and the loop serves others.
    return await asyncio.to_thread(write) if len(models) > FEW else write()


async def get_model(service: GenerationService, http: HttpRequest) -> Reply[Model]:
    """Describe one model."""
    return Reply(_model(service.local.catalog.get(http.path_params["model"]), service, manager_of(http)))


def _model(model: ServedModel, service: GenerationService, adapters: AdapterManager) -> Model:
    catalog = service.local.catalog
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
        "tier": adapters.tier_of(model),
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
