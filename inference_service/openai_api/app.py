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

from inference_service.openai_api import chat, completions, models, tokens
from inference_service.openai_api.errors import on_failure, on_fault, on_http_error
from inference_service.openai_api.front import Front
from inference_service.serving.service import GenerationService
from shared.access.asgi import AccessMiddleware
from shared.access.keyring import Keyring
from shared.faults import Fault

Handler = Callable[[GenerationService, HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One route."""

    method: str
    path: str
    handler: Handler


ENDPOINTS: Final = (
    Endpoint("POST", "/v1/chat/completions", chat.chat_completions),
    Endpoint("POST", "/v1/completions", completions.completions),
    Endpoint("POST", "/v1/embeddings", models.embeddings),
    Endpoint("GET", "/v1/models", models.list_models),
    Endpoint("GET", "/v1/models/{model:path}", models.get_model),
    Endpoint("POST", "/tokenize", tokens.tokenize),
    Endpoint("POST", "/detokenize", tokens.detokenize),
    Endpoint("GET", "/version", models.show_version),
    Endpoint("GET", "/health", models.health),
)
"""Everything that is answered."""


def create_app(service: GenerationService, keyring: Keyring | None = None) -> Front:
    """Return the ASGI application; with a keyring, all but /health asks for a key."""
    routes = [
        Route(endpoint.path, partial(endpoint.handler, service), methods=[endpoint.method])
        for endpoint in ENDPOINTS
    ]
    handlers = {Fault: on_fault, HTTPException: on_http_error, Exception: on_failure}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Front(app if keyring is None else AccessMiddleware(app, keyring))
