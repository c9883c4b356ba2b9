"""The keys in front of an HTTP application."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from loramux_shared.access.keyring import Keyring, bearer
from loramux_shared.access.rights import ACCESS, Scope
from loramux_shared.faults import Fault, PermissionDenied, Unauthenticated

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


class AccessMiddleware:
    """Lets a request in whose key has the scope of its path; what is refused is told as OpenAI's API does."""

    def __init__(self, app: App, keyring: Keyring, scope_of: Callable[[str], Scope | None]) -> None:
        """Wrap an ASGI application; scope_of says what a path needs, and None opens it to everybody."""
        self._app = app
        self._keyring = keyring
        self._scope_of = scope_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it before anything of its body is read."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        wanted = self._scope_of(scope["path"])
        if wanted is None and scope["type"] == "http":
            await self._app(scope, receive, send)
            return
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        try:
            access = self._keyring.authorize(bearer(headers), wanted)
        except (Unauthenticated, PermissionDenied) as fault:
            await _refuse(fault, scope["type"], send)
            return
        token = ACCESS.set(access)
        try:
            await self._app(scope, receive, send)
        finally:
            ACCESS.reset(token)


async def _refuse(fault: Fault, kind: str, send: Send) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": fault.reason})
        return
    unknown = isinstance(fault, Unauthenticated)
    error = {
        "message": fault.message,
        "type": "authentication_error" if unknown else "permission_error",
        "param": None,
        "code": "invalid_api_key" if unknown else "permission_denied",
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if unknown:
        headers.append((b"www-authenticate", b"Bearer"))
    start = {"type": "http.response.start", "status": 401 if unknown else 403, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
