"""A route with its handler, and all that the OpenAPI document says of both."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.api.http.wire.body import Body, Query
from inference_service.api.http.wire.errors import Error
from inference_service.api.requests.service import GenerationService
from loramux_shared.access.keys import Scope
from loramux_shared.routes import Route

Handler = Callable[[GenerationService, HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A route and its handler; the rest is described by the OpenAPI document, and checked there."""

    route: Route
    handler: Handler
    """The first line of its docstring is the summary of the route; its return type is the schema of answers."""
    body: type[Body] | None = None
    """The body that the handler reads."""
    text: str | None = None
    """The media type of an answer that is no JSON."""
    query: type[Query] | None = None
    """The query that the handler reads."""
    fails: tuple[int, ...] = ()
    """Statuses of failures, besides those of every route, of keys and of bodies."""
    error: Any = Error
    """The type of the body of a failure."""
    reads_prompts: bool = False
    """True where an API process answers itself; the engine's process answers the others."""
    hinted: bool = False
    """True where headers say which version is to answer, and which one answered: `core.request.hinted`."""

    @property
    def method(self) -> str:
        """The method of the route."""
        return self.route.method

    @property
    def path(self) -> str:
        """The path of the route."""
        return self.route.path

    @property
    def scope(self) -> Scope | None:
        """The scope that a key must have."""
        return self.route.scope


@dataclass(frozen=True)
class Routes:
    """The port of routes that packages add."""

    endpoints: tuple[Endpoint, ...]
