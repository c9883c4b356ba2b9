"""The HTTP APIs behind Ray's HTTP proxies: reads the model, and hands the request to a replica for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, MutableMapping
from contextlib import aclosing
from typing import Any, Final

from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference_service.api.http.wire.refusals import fault_event, fault_response
from inference_service.api.http.wire.reply import while_connected
from loramux_ray.calls import HttpCall, Messages
from loramux_ray.forwarding import ONCE, PAUSES_S, Forwarder
from loramux_ray.names import ENGINE, MODEL
from loramux_shared.faults import Fault
from loramux_shared.routes import ROUTES
from loramux_shared.rpc.options import MAX_REQUEST_BYTES
from loramux_shared.untrusted_json import parse_json

RETRIED: Final = frozenset(route.path for route in ROUTES if route.method == "POST" and route.repeatable)
"""Routes that may be retried, beside everything that only reads."""
REQUEST_ID: Final = b"x-request-id"
SCOPE: Final = ("type", "http_version", "method", "scheme", "headers", "query_string", "server", "asgi")


class Ingress:
    """The application that Ray's HTTP proxies call, where they do not hand on themselves (`http_proxies`)."""

    def __init__(self, _engine: object) -> None:
        """Hand on to the engine of the same application; the argument lets Ray deploy both together."""
        self._replicas = Forwarder(ENGINE, serve.get_replica_context().app_name)

    async def __call__(self, http: Request) -> Response:
        """Answer a request; Ray adds its id itself, the one that it gave to the replica."""
        return Forwarded(self._replicas, http.scope.get("root_path", ""), without=REQUEST_ID)


class Forwarded(Response):
    """The answer of a replica, to a request below a prefix, without one of its headers."""

    def __init__(self, replicas: Forwarder, prefix: str, without: bytes = b"") -> None:
        super().__init__()
        self._replicas = replicas
        self._prefix = prefix.rstrip("/")
        self._without = without

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and the answer back.

        A failure on the way is reported as our own server reports it.
        """
        sent = _Sent(send, self._without)
        try:
            await self._forward(scope, receive, sent)
        except ClientDisconnect:
            return
        except Fault as fault:
            await sent.fail(fault, scope, receive)

    async def _forward(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        body = await _body(Request(scope, receive))
        call = HttpCall(_scope(scope, self._prefix), body, _peer(scope))
        key = await self._replicas.key(_model(scope, body))
        again = call.scope["path"] in RETRIED or scope["method"] in ("GET", "HEAD")
        pauses_s = PAUSES_S if again else ONCE
        parts = self._replicas.stream("http", call, key=key, pauses_s=pauses_s, elsewhere=_elsewhere)
        await while_connected(receive, _send(parts, sent))


async def _send(parts: AsyncGenerator[Messages], sent: _Sent) -> None:
    async with aclosing(parts):
        async for messages in parts:
            for message in messages:
                await sent(message)


class _Sent:
    """The part of an answer that a client was sent."""

    def __init__(self, send: Send, without: bytes) -> None:
        self._send = send
        self._without = without
        self._begun = self._events = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            message["headers"] = [pair for pair in message["headers"] if pair[0] != self._without]
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._events = kind.startswith(b"text/event-stream")
        await self._send(message)

    async def fail(self, fault: Fault, scope: Scope, receive: Receive) -> None:
        """Tell a fault, where that can still be reported: as the answer, or as the last event of a stream."""
        if not self._begun:
            await fault_response(scope, fault)(scope, receive, self._send)
        elif self._events:
            await self._send({"type": "http.response.body", "body": fault_event(scope, fault)})
        else:
            raise fault


def _scope(scope: Scope, prefix: str) -> dict[str, Any]:
    """Return what the application of a replica reads; the path without the prefix that Ray routes by."""
    path = scope["path"].removeprefix(prefix) or "/"
    return {name: scope[name] for name in SCOPE if name in scope} | {
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "client": scope.get("client"),
    }


async def _body(http: Request) -> bytes:
    """Return the body; of one that is too large, enough for a replica to see that."""
    data = bytearray()
    async for part in http.stream():
        if len(data) <= MAX_REQUEST_BYTES:
            data += part
    return bytes(data[: MAX_REQUEST_BYTES + 1])


def _model(scope: Scope, body: bytes) -> str:
    for name, value in scope["headers"]:
        if name == MODEL.encode():
            return str(value.decode("latin-1"))
    try:
        parsed = parse_json(body)
        model = parsed.get("lora_path") or parsed.get("model")
    except (ValueError, AttributeError):
        return ""  # a replica refuses the body with the reason
    return model if isinstance(model, str) else ""


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _elsewhere(messages: Messages) -> bool:
    return messages[0].get("status") == 503
