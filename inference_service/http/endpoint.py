"""What is known of a route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.http.answers import Error
from inference_service.http.wire.body import Body, Query
from inference_service.serving.service import GenerationService
from loramux_shared.access.rights import Scope
from loramux_shared.routes import Route

Handler = Callable[[GenerationService, HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """What answers a route; all but route and handler is told to readers of `openapi`, and checked there."""

    route: Route
    handler: Handler
    """The first line of its docstring says what the route is for, to readers of `openapi` too."""
    body: type[Body] | None = None
    """What it reads."""
    media: tuple[str, ...] = ("application/json",)
    """Types of its answer; none where that has no content."""
    status: int = 200
    """When all is well; above 399 where nothing else is ever answered."""
    answer: Any = None
    """The type of a JSON answer."""
    event: Any = None
    """The type of what an event of a stream holds."""
    query: type[Query] | None = None
    """What its query may hold."""
    fails: tuple[int, ...] = ()
    """Statuses of failures, besides those of every route, of keys and of bodies."""
    error: Any = Error
    """The type of what a failure is told with."""
    hinted: bool = False
    """True where headers say which version is to answer, and which one answered: `serving.request.hinted`."""

    @property
    def method(self) -> str:
        """Of its route."""
        return self.route.method

    @property
    def path(self) -> str:
        """Of its route."""
        return self.route.path

    @property
    def scope(self) -> Scope | None:
        """Of its route."""
        return self.route.scope
