"""OpenAI's API behind Ray's HTTP doors: reads the model, and hands the request to a replica for it."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from contextlib import aclosing
from typing import Any, Final

from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference_service.openai_api.errors import error_body, error_response
from inference_service.openai_api.reply import event
from loramux_shared.faults import Fault
from loramux_shared.rpc.options import MAX_REQUEST_BYTES
from ray_service.calls import HttpCall, Messages
from ray_service.forwarding import ONCE, PAUSES_S, Forwarder
from ray_service.names import ENGINE
from ray_service.proxies import MODEL

RETRIED: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
"""What may be asked twice, beside everything that only reads."""
REQUEST_ID: Final = b"x-request-id"
SCOPE: Final = ("type", "http_version", "method", "scheme", "headers", "query_string", "server", "asgi")


class Door:
    """The application that Ray's HTTP doors call."""

    def __init__(self, _engine: object) -> None:
        """Hand on to the engine of the same application; the argument lets Ray deploy both together."""
        self._replicas = Forwarder(ENGINE, serve.get_replica_context().app_name)

    async def __call__(self, http: Request) -> Response:  # noqa: ARG002 - it is in the scope too
        """Answer a request."""
        return Forwarded(self._replicas)


class Forwarded(Response):
    """The answer of a replica."""

    def __init__(self, replicas: Forwarder) -> None:
        super().__init__()
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and the answer back; what fails on the way is told as our own door tells it."""
        sent = _Sent(send)
        try:
            call = HttpCall(_scope(scope), await _body(Request(scope, receive)), _peer(scope))
            key = await self._replicas.key(_model(scope, call.body))
            path, method = call.scope["path"], call.scope["method"]
            pauses_s = PAUSES_S if path in RETRIED or method in ("GET", "HEAD") else ONCE
            parts = self._replicas.stream("http", call, key=key, pauses_s=pauses_s, elsewhere=_elsewhere)
            async with aclosing(parts):
                async for messages in parts:
                    for message in messages:
                        await sent(message)
        except ClientDisconnect:
            return
        except Fault as fault:
            await sent.fail(fault, scope, receive)


class _Sent:
    """What a client was sent of an answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = self._events = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            # Ray's door adds the request's id itself: the one that it gave to the replica.
            message["headers"] = [pair for pair in message["headers"] if pair[0] != REQUEST_ID]
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._events = kind.startswith(b"text/event-stream")
        await self._send(message)

    async def fail(self, fault: Fault, scope: Scope, receive: Receive) -> None:
        """Tell a fault, where that can still be told: as the answer, or as the last event of a stream."""
        if not self._begun:
            await error_response(fault)(scope, receive, self._send)
        elif self._events:
            await self._send({"type": "http.response.body", "body": event(error_body(fault))})
        else:
            raise fault


def _scope(scope: Scope) -> dict[str, Any]:
    """Return what the application of a replica reads; the path without the prefix that Ray routes by."""
    path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
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
        model = json.loads(body).get("model", "")
    except (ValueError, AttributeError, RecursionError):
        return ""  # a replica says what is wrong with it
    return model if isinstance(model, str) else ""


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _elsewhere(messages: Messages) -> bool:
    return messages[0].get("status") == 503
