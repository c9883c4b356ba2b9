"""The application: its routes, and how a request gets to them."""

from __future__ import annotations

from functools import partial
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, compile_path

from inference_service.openai_api import (
    chat,
    completions,
    embeddings,
    models,
    operators,
    state,
    tokens,
    trainers,
)
from inference_service.openai_api.chat_schema import ChatBody, TokenizeBody
from inference_service.openai_api.endpoint import Endpoint
from inference_service.openai_api.front import Front
from inference_service.openai_api.openapi import document
from inference_service.openai_api.operators import LoadBody, RollbackBody, UnloadBody
from inference_service.openai_api.page import page_files
from inference_service.openai_api.pooling_schema import EmbeddingsBody
from inference_service.openai_api.refusals import fault_response, on_failure, on_fault, on_http_error
from inference_service.openai_api.reply import json_response
from inference_service.openai_api.responses.create import count_input, create_response
from inference_service.openai_api.responses.schema import ResponsesBody
from inference_service.openai_api.schema import CompletionBody, DetokenizeBody
from inference_service.serving.adapters.fixed import fixed_manager
from inference_service.serving.adapters.manager import AdapterManager
from inference_service.serving.service import GenerationService
from loramux_shared.access.asgi import AccessMiddleware
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.rights import Scope
from loramux_shared.faults import Fault
from loramux_shared.tracing.asgi import TraceMiddleware
from loramux_shared.tracing.door import DoorSpans


async def show_openapi(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Describe all of this."""
    return json_response(document(ENDPOINTS))


ANSWERS: Final = ("application/json", "text/event-stream")
"""Of what can be streamed."""
ENDPOINTS: Final = (
    Endpoint("POST", "/v1/chat/completions", chat.chat_completions, body=ChatBody, media=ANSWERS),
    Endpoint("POST", "/v1/completions", completions.completions, body=CompletionBody, media=ANSWERS),
    Endpoint("POST", "/v1/responses", create_response, body=ResponsesBody, media=ANSWERS),
    Endpoint("POST", "/v1/responses/input_tokens", count_input, body=ResponsesBody),
    Endpoint("POST", "/v1/embeddings", embeddings.embeddings, body=EmbeddingsBody),
    Endpoint("GET", "/v1/models", models.list_models),
    Endpoint("GET", "/v1/models/{model:path}", models.get_model),
    Endpoint("GET", "/v1/adapters", operators.list_adapters, Scope.ADMIN),
    Endpoint("POST", "/v1/adapters/{name:path}/pin", operators.pin_adapter, Scope.ADMIN),
    Endpoint("POST", "/v1/adapters/{name:path}/unpin", operators.unpin_adapter, Scope.ADMIN),
    Endpoint("POST", "/v1/rollback", operators.roll_back, Scope.ADMIN, RollbackBody),
    Endpoint(
        "POST", "/v1/load_lora_adapter", operators.load_lora_adapter, Scope.ADMIN, LoadBody, ("text/plain",)
    ),
    Endpoint(
        "POST",
        "/v1/unload_lora_adapter",
        operators.unload_lora_adapter,
        Scope.ADMIN,
        UnloadBody,
        ("text/plain",),
    ),
    Endpoint("POST", "/pause", trainers.pause, Scope.ADMIN),
    Endpoint("POST", "/resume", trainers.resume, Scope.ADMIN),
    Endpoint("GET", "/is_paused", trainers.is_paused, Scope.ADMIN),
    Endpoint("GET", "/get_world_size", trainers.get_world_size),
    Endpoint("GET", "/server_info", trainers.server_info),
    Endpoint("POST", "/tokenize", tokens.tokenize, body=TokenizeBody),
    Endpoint("POST", "/detokenize", tokens.detokenize, body=DetokenizeBody),
    Endpoint("GET", "/version", models.show_version),
    Endpoint("GET", "/openapi.json", show_openapi),
    Endpoint("GET", "/health", models.health, None, media=()),
    Endpoint("GET", "/ping", models.health, None, media=()),
    Endpoint("POST", "/ping", models.health, None, media=()),
    Endpoint("GET", "/state", state.show_state),
    Endpoint("GET", "/load", state.show_load, Scope.METRICS),
    Endpoint("GET", "/loads", state.show_loads, Scope.METRICS),
    Endpoint("GET", "/v1/loads", state.show_loads, Scope.METRICS),
    Endpoint("GET", "/metrics", models.show_metrics, Scope.METRICS, media=("text/plain",)),
    *(Endpoint("GET", path, handler, None, media=()) for path, handler in page_files().items()),
)
"""Everything that is answered."""
TRACED: Final = frozenset(
    each.path for each in ENDPOINTS if each.method == "POST" and each.scope and "{" not in each.path
)
"""What monitors ask all the time is left out."""


def create_app(
    service: GenerationService,
    keyring: Keyring | None = None,
    tracing: DoorSpans | None = None,
    adapters: AdapterManager | None = None,
) -> Front:
    """Return the ASGI application; with a keyring, all but health and the page asks for a key.

    Without adapters, those of the service's catalog are there for good.
    """
    routes = [
        Route(endpoint.path, partial(endpoint.handler, service), methods=[endpoint.method])
        for endpoint in ENDPOINTS
    ]
    handlers = {Fault: on_fault, HTTPException: on_http_error, Exception: on_failure}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.adapters = adapters or fixed_manager(service.catalog)
    guarded = app if keyring is None else AccessMiddleware(app, keyring, scope_of, fault_response)
    traced = guarded if tracing is None else TraceMiddleware(guarded, tracing, TRACED)
    return Front(traced, service.metrics.responded)


def scope_of(path: str) -> Scope | None:
    """Return what a path asks of a key: what the first of the routes asks that may answer it."""
    if path in _SCOPES:
        return _SCOPES[path]
    return next((scope for pattern, scope in _PATTERNS if pattern.match(path)), Scope.INFER)


_SCOPES: Final = {each.path: each.scope for each in ENDPOINTS if "{" not in each.path}
_PATTERNS: Final = tuple((compile_path(each.path)[0], each.scope) for each in ENDPOINTS if "{" in each.path)
