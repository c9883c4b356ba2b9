"""The application: its routes, and how a request gets to them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, compile_path

from inference_service.adapters.fixed import fixed_manager
from inference_service.adapters.manager import AdapterManager
from inference_service.openai_api import (
    answers,
    chat,
    completions,
    embeddings,
    generated,
    models,
    operators,
    scores,
    state,
    tokens,
    trainers,
)
from inference_service.openai_api.chat_schema import ChatBody
from inference_service.openai_api.endpoint import Endpoint, Handler
from inference_service.openai_api.front import Front
from inference_service.openai_api.messages import answers as messages
from inference_service.openai_api.messages.routes import count_tokens, create_message
from inference_service.openai_api.messages.schema import CountBody, MessagesBody
from inference_service.openai_api.openapi import Served, document
from inference_service.openai_api.operators import LoadBody, PageQuery, RollbackBody, UnloadBody
from inference_service.openai_api.page import page_files
from inference_service.openai_api.pooling_schema import ClassifyBody, EmbeddingsBody, RerankBody, ScoreBody
from inference_service.openai_api.refusals import fault_response, on_failure, on_fault, on_http_error
from inference_service.openai_api.reply import json_response
from inference_service.openai_api.responses import answers as responses
from inference_service.openai_api.responses.compact import compact
from inference_service.openai_api.responses.create import count_input, create_response
from inference_service.openai_api.responses.schema import CompactBody, ResponsesBody
from inference_service.openai_api.schema import CompletionBody
from inference_service.openai_api.tokens_schema import DetokenizeBody, TokenizeBody
from inference_service.openai_api.trainers import InfoQuery, PauseQuery
from inference_service.serving.service import GenerationService
from loramux_shared.access.asgi import AccessMiddleware
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.rights import Scope
from loramux_shared.faults import Fault
from loramux_shared.tracing.asgi import TraceMiddleware
from loramux_shared.tracing.door import DoorSpans


async def show_openapi(service: GenerationService, http: HttpRequest) -> Response:
    """Describe all of this."""
    models = list(service.catalog)
    served = Served(
        model=next((model.name for model in models if model.num_labels is None), service.catalog.base_name),
        scorer=next((model.name for model in models if model.num_labels == 1), ""),
        classifier=next((model.name for model in models if model.num_labels), ""),
        keyless=http.app.state.keyless,
    )
    return json_response(document(ENDPOINTS, served))


ANSWERS: Final = ("application/json", "text/event-stream")
"""Of what can be streamed."""
TEXT: Final = ("text/plain",)
CHANGES: Final = (403, 404, 409, 504)
"""Statuses of failures of what changes the deployment."""
_counting = partial(Endpoint, "POST", fails=(404, 429))
"""What reads a prompt as answers do, and computes nothing."""
_computing = partial(_counting, hinted=True)
"""What the engine answers."""
_streaming = partial(_computing, media=ANSWERS)
ENDPOINTS: Final = (
    _streaming(
        "/v1/chat/completions",
        chat.chat_completions,
        body=ChatBody,
        answer=generated.ChatCompletion,
        event=generated.ChatCompletionChunk,
    ),
    _streaming(
        "/v1/completions",
        completions.completions,
        body=CompletionBody,
        answer=generated.Completion,
        event=generated.CompletionChunk,
    ),
    _streaming(
        "/v1/messages",
        create_message,
        body=MessagesBody,
        answer=messages.AnthropicMessage,
        event=messages.MessageEvent,
        fails=(404, 429, 529),
        error=messages.MessageError,
    ),
    _counting(
        "/v1/messages/count_tokens",
        count_tokens,
        body=CountBody,
        answer=messages.TokenCount,
        error=messages.MessageError,
    ),
    _streaming(
        "/v1/responses",
        create_response,
        body=ResponsesBody,
        answer=responses.Response,
        event=responses.ResponseEvent,
    ),
    _counting("/v1/responses/input_tokens", count_input, body=ResponsesBody, answer=responses.InputTokens),
    _computing("/v1/responses/compact", compact, body=CompactBody, answer=responses.Compaction),
    _computing("/v1/embeddings", embeddings.embeddings, body=EmbeddingsBody, answer=answers.Embeddings),
    *(
        _computing(path, handler, body=body, answer=answer)
        for handler, body, answer, paths in (
            (scores.score, ScoreBody, answers.Scores, ("/score", "/v1/score")),
            (scores.rerank, RerankBody, answers.Ranking, ("/rerank", "/v1/rerank", "/v2/rerank")),
            (scores.classify, ClassifyBody, answers.Classes, ("/classify", "/v1/classify")),
        )
        for path in paths
    ),
    Endpoint("GET", "/v1/models", models.list_models, answer=answers.ModelList),
    Endpoint("GET", "/v1/models/{model:path}", models.get_model, answer=answers.Model, fails=(404,)),
    Endpoint(
        "GET",
        "/v1/adapters",
        operators.list_adapters,
        Scope.ADMIN,
        answer=answers.AdapterList,
        query=PageQuery,
    ),
    *(
        Endpoint("POST", path, handler, Scope.ADMIN, answer=answers.Adapter, fails=(403, 404))
        for path, handler in (
            ("/v1/adapters/{name:path}/pin", operators.pin_adapter),
            ("/v1/adapters/{name:path}/unpin", operators.unpin_adapter),
        )
    ),
    Endpoint(
        "POST",
        "/v1/rollback",
        operators.roll_back,
        Scope.ADMIN,
        RollbackBody,
        answer=answers.RolledBack,
        fails=CHANGES,
    ),
    *(
        Endpoint("POST", path, handler, Scope.ADMIN, body, TEXT, fails=CHANGES, error=answers.VllmError)
        for path, handler, body in (
            ("/v1/load_lora_adapter", operators.load_lora_adapter, LoadBody),
            ("/v1/unload_lora_adapter", operators.unload_lora_adapter, UnloadBody),
        )
    ),
    Endpoint("POST", "/pause", trainers.pause, Scope.ADMIN, answer=answers.PauseStatus, query=PauseQuery),
    Endpoint("POST", "/resume", trainers.resume, Scope.ADMIN, answer=answers.PauseStatus),
    Endpoint("GET", "/is_paused", trainers.is_paused, Scope.ADMIN, answer=answers.IsPaused),
    Endpoint("GET", "/get_world_size", trainers.get_world_size, answer=answers.WorldSize),
    Endpoint("GET", "/server_info", trainers.server_info, answer=answers.ServerInfo, query=InfoQuery),
    Endpoint("POST", "/tokenize", tokens.tokenize, body=TokenizeBody, answer=answers.Tokens, fails=(404,)),
    Endpoint(
        "POST", "/detokenize", tokens.detokenize, body=DetokenizeBody, answer=answers.Prompt, fails=(404,)
    ),
    Endpoint("GET", "/version", models.show_version, answer=answers.Version),
    Endpoint("GET", "/openapi.json", show_openapi),
    Endpoint("GET", "/health", models.health, None, answer=answers.Health),
    Endpoint("GET", "/ping", models.health, None, answer=answers.Health),
    Endpoint("POST", "/ping", models.health, None, answer=answers.Health),
    Endpoint("GET", "/state", state.show_state, answer=answers.State),
    Endpoint("GET", "/load", state.show_load, Scope.METRICS, answer=answers.Load),
    Endpoint("GET", "/loads", state.show_loads, Scope.METRICS, answer=answers.Loads),
    Endpoint("GET", "/v1/loads", state.show_loads, Scope.METRICS, answer=answers.Loads),
    Endpoint("GET", "/metrics", models.show_metrics, Scope.METRICS, media=TEXT),
    *(Endpoint("GET", path, file.show, None, media=(file.media_type,)) for path, file in page_files().items()),
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
        Route(path, partial(_answer, service, handlers_of(path)), methods=list(handlers_of(path)))
        for path in dict.fromkeys(endpoint.path for endpoint in ENDPOINTS)
    ]
    handlers = {Fault: on_fault, HTTPException: on_http_error, Exception: on_failure}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.keyless = keyring is None
    app.state.adapters = adapters or fixed_manager(service.catalog)
    guarded = app if keyring is None else AccessMiddleware(app, keyring, scope_of, fault_response)
    traced = guarded if tracing is None else TraceMiddleware(guarded, tracing, TRACED)
    return Front(traced, service.metrics.responded)


async def _answer(service: GenerationService, handlers: Mapping[str, Handler], http: HttpRequest) -> Response:
    """Answer one of the methods of a path; HEAD is GET."""
    return await handlers[http.method if http.method in handlers else "GET"](service, http)


def handlers_of(path: str) -> dict[str, Handler]:
    """Return what answers a path, by method: one route has them all, so that a refusal can name them all."""
    return {endpoint.method: endpoint.handler for endpoint in ENDPOINTS if endpoint.path == path}


def scope_of(path: str) -> Scope | None:
    """Return what a path asks of a key: what the first of the routes asks that may answer it."""
    if path in _SCOPES:
        return _SCOPES[path]
    return next((scope for pattern, scope in _PATTERNS if pattern.match(path)), Scope.INFER)


_SCOPES: Final = {each.path: each.scope for each in ENDPOINTS if "{" not in each.path}
_PATTERNS: Final = tuple((compile_path(each.path)[0], each.scope) for each in ENDPOINTS if "{" in each.path)
