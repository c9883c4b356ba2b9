"""The application: its routes, and how a request gets to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from inference_service.openai_api import chat, completions, models, state, tokens
from inference_service.openai_api.errors import on_failure, on_fault, on_http_error
from inference_service.openai_api.front import Front
from inference_service.openai_api.page import page_files
from inference_service.serving.service import GenerationService
from loramux_shared.access.asgi import AccessMiddleware
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.rights import Scope
from loramux_shared.faults import Fault
from loramux_shared.tracing.asgi import TraceMiddleware
from loramux_shared.tracing.door import DoorSpans

Handler = Callable[[GenerationService, HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One route."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None = Scope.INFER
    """Of the keys that open it; None: no key is asked for."""


ENDPOINTS: Final = (
    Endpoint("POST", "/v1/chat/completions", chat.chat_completions),
    Endpoint("POST", "/v1/completions", completions.completions),
    Endpoint("POST", "/v1/embeddings", models.embeddings),
    Endpoint("GET", "/v1/models", models.list_models),
    Endpoint("GET", "/v1/models/{model:path}", models.get_model),
    Endpoint("POST", "/tokenize", tokens.tokenize),
    Endpoint("POST", "/detokenize", tokens.detokenize),
    Endpoint("GET", "/version", models.show_version),
    Endpoint("GET", "/health", models.health, None),
    Endpoint("GET", "/state", state.show_state),
    Endpoint("GET", "/metrics", models.show_metrics, Scope.METRICS),
    *(Endpoint("GET", path, handler, None) for path, handler in page_files().items()),
)
"""Everything that is answered."""
TRACED: Final = frozenset(endpoint.path for endpoint in ENDPOINTS if endpoint.method == "POST")
"""What monitors ask all the time is left out."""


def create_app(
    service: GenerationService, keyring: Keyring | None = None, tracing: DoorSpans | None = None
) -> Front:
    """Return the ASGI application; with a keyring, all but /health and the page asks for a key."""
    routes = [
        Route(endpoint.path, partial(endpoint.handler, service), methods=[endpoint.method])
        for endpoint in ENDPOINTS
    ]
    handlers = {Fault: on_fault, HTTPException: on_http_error, Exception: on_failure}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    scopes = {endpoint.path: endpoint.scope for endpoint in ENDPOINTS}
    guarded = app if keyring is None else AccessMiddleware(app, keyring, scopes)
    traced = guarded if tracing is None else TraceMiddleware(guarded, tracing, TRACED)
    return Front(traced, service.metrics.responded)
