"""The application: its routes, and how a request gets to them."""

from collections.abc import Collection
from functools import partial
from itertools import chain
from typing import Final

from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request as HttpRequest
from starlette.routing import Route, Router, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from inference_service.adapters.manager import AdapterManager
from inference_service.api.http.admin import operators, state
from inference_service.api.http.admin.operators import LoadBody, PageQuery, RollbackBody, UnloadBody, VllmError
from inference_service.api.http.anthropic.messages import count_tokens, create_message
from inference_service.api.http.anthropic.schema import CountBody, MessagesBody
from inference_service.api.http.compat import ROUTES as COMPAT
from inference_service.api.http.endpoint import Endpoint, Handler, Routes
from inference_service.api.http.openai import models
from inference_service.api.http.openai.chat import chat_completions
from inference_service.api.http.openai.chat_schema import ChatBody
from inference_service.api.http.openai.completions import completions
from inference_service.api.http.openai.schema import CompletionBody
from inference_service.api.http.openapi.document import show_openapi
from inference_service.api.http.page import page_endpoints
from inference_service.api.http.responses.create import count_input, create_response
from inference_service.api.http.responses.schema import ResponsesBody
from inference_service.api.http.vectors import pooling, scores, tei
from inference_service.api.http.vectors.embeddings import (
    ClassifyBody,
    EmbeddingsBody,
    RerankBody,
    ScoreBody,
    embeddings,
)
from inference_service.api.http.vectors.tei import EmbedBody, PredictBody, RanksBody, SparseBody
from inference_service.api.http.wire.front import Front
from inference_service.api.http.wire.refusals import FAILED, MessageError, fault_response, http_error_response
from inference_service.api.requests.service import GenerationService
from loramux_shared import routes
from loramux_shared.access.asgi import AccessMiddleware
from loramux_shared.access.hosts import HostMiddleware
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.keys import Scope as AccessScope
from loramux_shared.access.shares import Shares
from loramux_shared.faults import Fault, InternalFault
from loramux_shared.ports import log_left_out, registered
from loramux_shared.process import connections_per_server
from loramux_shared.routes import ROUTES
from loramux_shared.tracing import Tracing

TEXT: Final = "text/plain"
CHANGES: Final = (403, 404, 409, 504)
"""Statuses of failures of routes that change the deployment."""
_counting = partial(Endpoint, fails=(404, 429), reads_prompts=True)
"""A route that reads a prompt as answers do, and computes nothing."""
_computing = partial(_counting, hinted=True)
"""A route that the engine answers."""
_SERVED: Final[tuple[Endpoint, ...]] = (
    _computing(routes.CHAT_COMPLETIONS, chat_completions, ChatBody),
    _computing(routes.COMPLETIONS, completions, CompletionBody),
    _computing(routes.MESSAGES, create_message, MessagesBody, fails=(404, 429, 529), error=MessageError),
    _counting(routes.COUNT_TOKENS, count_tokens, CountBody, error=MessageError),
    _computing(routes.RESPONSES, create_response, ResponsesBody),
    _counting(routes.INPUT_TOKENS, count_input, ResponsesBody),
    _computing(routes.EMBEDDINGS, embeddings, EmbeddingsBody),
    *(_computing(route, scores.score, ScoreBody) for route in (routes.SCORE, routes.SCORE_V1)),
    *(_computing(route, scores.rerank, RerankBody) for route in (routes.RERANK_V1, routes.RERANK_V2)),
    _computing(routes.RERANK, tei.rank, RanksBody),
    *(_computing(route, scores.classify, ClassifyBody) for route in (routes.CLASSIFY, routes.CLASSIFY_V1)),
    _computing(routes.PREDICT, tei.predict, PredictBody),
    _computing(routes.EMBED, tei.embed, EmbedBody),
    _computing(routes.EMBED_SPARSE, tei.embed_sparse, SparseBody),
    _computing(routes.POOLING, pooling.pool, pooling.TaskBody),
    Endpoint(routes.MODELS, models.list_models),
    Endpoint(routes.MODEL, models.get_model, fails=(404,)),
    Endpoint(routes.ADAPTERS, operators.list_adapters, query=PageQuery),
    Endpoint(routes.PIN, operators.pin_adapter, fails=(403, 404)),
    Endpoint(routes.UNPIN, operators.unpin_adapter, fails=(403, 404)),
    Endpoint(routes.ROLLBACK, operators.roll_back, RollbackBody, fails=CHANGES),
    *(
        Endpoint(route, handler, body, TEXT, fails=CHANGES, error=VllmError)
        for route, handler, body in (
            (routes.LOAD_ADAPTER, operators.load_lora_adapter, LoadBody),
            (routes.UNLOAD_ADAPTER, operators.unload_lora_adapter, UnloadBody),
        )
    ),
    Endpoint(routes.INFO, tei.info, fails=(404,)),
    Endpoint(routes.VERSION, state.show_version),
    *chain.from_iterable(each.endpoints for each in registered("routes", Routes, log_left_out).values()),
    *COMPAT,
    Endpoint(routes.OPENAPI, show_openapi),
    *(Endpoint(route, state.health) for route in (routes.HEALTH, routes.PING, routes.POST_PING)),
    Endpoint(routes.STATE, state.show_state),
    Endpoint(routes.LOAD, state.show_load),
    Endpoint(routes.METRICS, state.show_metrics, text=TEXT),
    *page_endpoints(),
)
ENDPOINTS: Final = tuple(
    sorted(_SERVED, key=lambda each: ROUTES.index(each.route) if each.route in ROUTES else len(ROUTES))
)
"""All routes, in the order of `ROUTES`, and the page behind them."""
TRACED: Final = frozenset(
    each.path for each in ENDPOINTS if each.method == "POST" and each.scope and "{" not in each.path
)
"""Routes that have spans; those that monitors call all the time have none."""


def create_app(
    service: GenerationService,
    keyring: Keyring | None = None,
    tracing: Tracing | None = None,
    adapters: AdapterManager | None = None,
    relay: Handler | None = None,
    max_connections: int | None = None,
    hosts: Collection[str] | None = None,
) -> Front:
    """Return the ASGI application; with a keyring, all but health and the page asks for a key.

    Without adapters, those of the service's catalog are there for good. relay answers what reads no prompt,
    where the engine is in another process. Keys share max_connections requests that are open at once.
    hosts are the names of the server beside loopback's; None: any.
    """
    app = Application(service, relay)
    app.state.keyless = keyring is None
    app.state.adapters = adapters or (service.local.adapters if relay is None else None)
    guarded: ASGIApp = app
    if keyring is not None:
        places = Shares(max_connections or connections_per_server())
        guarded = AccessMiddleware(app, keyring, scope_of, fault_response, places)
    traced = guarded if tracing is None else tracing.over(guarded, TRACED)
    named = traced if hosts is None else HostMiddleware(traced, hosts, fault_response)
    return Front(named, service.metrics.responded)


class Application:
    """Routes requests, and answers those that fail.

    Starlette's own application does the same with three functions that every part of a stream passes.
    """

    def __init__(self, service: GenerationService, relay: Handler | None = None) -> None:
        self.state = State()
        paths = dict.fromkeys(endpoint.path for endpoint in ENDPOINTS)
        self.routes = [
            Route(path, Resource(service, path, relay), methods=list(handlers_of(path))) for path in paths
        ]
        self._router = Router(self.routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; no such route, or no such method of it, is refused."""
        scope["app"] = self
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            await http_error_response(scope, error)(scope, receive, send)


class Resource:
    """The handlers of a path, one for each of its methods."""

    def __init__(self, service: GenerationService, path: str, relay: Handler | None) -> None:
        self._service = service
        self._handlers = handlers_of(path, relay)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one of the path's methods; HEAD is GET."""
        http = HttpRequest(scope, receive)
        handler = self._handlers[http.method if http.method in self._handlers else "GET"]
        try:
            response = await handler(self._service, http)
        except Fault as fault:
            response = fault_response(scope, fault)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception:
            await fault_response(scope, InternalFault(FAILED))(scope, receive, send)
            raise  # `front` logs the error
        await response(scope, receive, send)


def handlers_of(path: str, relay: Handler | None = None) -> dict[str, Handler]:
    """Return what answers a path, by method: one route has them all, so that a refusal can name them all."""
    return {
        each.method: each.handler if relay is None or each.reads_prompts else relay
        for each in ENDPOINTS
        if each.path == path
    }


def scope_of(path: str) -> AccessScope | None:
    """Return what a path asks of a key: what the first of the routes asks that may answer it."""
    if path in _SCOPES:
        return _SCOPES[path]
    return next((scope for pattern, scope in _PATTERNS if pattern.match(path)), AccessScope.INFER)


_SCOPES: Final = {each.path: each.scope for each in ENDPOINTS if "{" not in each.path}
_PATTERNS: Final = tuple((compile_path(each.path)[0], each.scope) for each in ENDPOINTS if "{" in each.path)
