"""The HTTP APIs in Ray's own HTTP proxies: they hand on to the replicas, and need no `Ingress` on the way.

A node's variable makes its proxy call `middlewares` (`names.MIDDLEWARES`). Without it, Ray's proxy calls a
`Ingress`: one more process that every token passes, and that takes with it what it hands on when its node ends.
Ray's proxy knows the application of a path; that is no public interface of Ray.
"""

from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from loramux_ray.forwarding import Forwarder
from loramux_ray.grpc_proxies import counted
from loramux_ray.ingress import Forwarded
from loramux_ray.names import ENGINE, INGRESS


def middlewares() -> list[Middleware]:
    """Return the middlewares that Ray's HTTP proxy puts before its own application."""
    return [Middleware(HandOn)]


class HandOn:
    """Answers what is for an application of ours, and leaves the rest to Ray."""

    def __init__(self, app: ASGIApp) -> None:
        """Stand before an application; Ray's own is in the middleware that gives requests their ids."""
        self._app = app
        self._proxy: Any = getattr(app, "_app", app)
        self._replicas: dict[str, Forwarder] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        found = self._proxy.proxy_router.match_route(scope["path"]) if scope["type"] == "http" else None
        if found is None or scope["path"].startswith("/-/") or found[1].deployment_name != INGRESS:
            await self._app(scope, receive, send)
            return
        prefix, handle = found[:2]
        replicas = self._replicas.setdefault(handle.app_name, Forwarder(ENGINE, handle.app_name))
        with counted(self._proxy):
            await Forwarded(replicas, prefix)(scope, receive, send)
