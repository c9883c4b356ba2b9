"""What is known of a route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.openai_api.schema import Body
from inference_service.serving.service import GenerationService
from loramux_shared.access.rights import Scope

Handler = Callable[[GenerationService, HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One route."""

    method: str
    path: str
    handler: Handler
    """The first line of its docstring says what the route is for, to readers of `openapi` too."""
    scope: Scope | None = Scope.INFER
    """Of the keys that open it; None: no key is asked for."""
    body: type[Body] | None = None
    """What it reads."""
    media: tuple[str, ...] = ("application/json",)
    """Types of its answer; none where that has no content."""
    status: int = 200
    """When all is well; above 399 where nothing else is ever answered."""
