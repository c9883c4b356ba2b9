"""The keys in front of an HTTP application."""

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from typing import Any, TypeAlias

from loramux_shared.access.keyring import Keyring, key_of
from loramux_shared.access.keys import ACCESS, Scope
from loramux_shared.access.shares import Shares
from loramux_shared.faults import Fault, PermissionDenied, QueueFull, Unauthenticated

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


class AccessMiddleware:
    """Lets a request in whose key has the scope of its path."""

    def __init__(
        self,
        app: App,
        keyring: Keyring,
        scope_of: Callable[[str], Scope | None],
        refusal: Callable[[Message, Fault], App],
        places: Shares,
    ) -> None:
        """Wrap an ASGI application.

        `scope_of` returns the scope that a path needs, or None for a path that is open to everybody; `refusal`
        returns the application that sends a fault to the client; keys share the places for open requests.
        """
        self._app = app
        self._keyring = keyring
        self._scope_of = scope_of
        self._refusal = refusal
        self._places = places

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it before anything of its body is read."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        scope_needed = self._scope_of(scope["path"])
        if scope_needed is None and scope["type"] == "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as place:
            try:
                access = self._keyring.authorize(key_of(scope["headers"]), scope_needed)
                place.enter_context(self._places.held(access.key_id, "open requests"))
            except (Unauthenticated, PermissionDenied, QueueFull) as fault:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008, "reason": fault.reason})
                else:
                    await self._refusal(scope, fault)(scope, receive, send)
                return
            token = ACCESS.set(access)
            try:
                await self._app(scope, receive, send)
            finally:
                ACCESS.reset(token)
