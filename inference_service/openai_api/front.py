"""What every request passes first: its id, the drain, and the last line of defence."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any, Final

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from inference_service.openai_api.errors import error_response
from shared.faults import ShuttingDown

log = structlog.get_logger()
DRAINING: Final = "the server is shutting down and takes no new requests. Retry with another replica."
SANE_ID: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")


class Front:
    """Ends every request once, counts those that are open, and lets none in while it drains."""

    def __init__(self, app: ASGIApp, responded: Callable[[int], None]) -> None:
        """Stand before an application; responded hears the status of every answer."""
        self._app = app
        self._responded = responded
        self.draining = False
        self.open = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        answer = _Answer(send, _request_id(scope), self._responded)
        self.open += 1
        self.idle.clear()
        try:
            with bound_contextvars(request_id=answer.request_id):
                if self.draining:
                    await error_response(ShuttingDown(DRAINING))(scope, receive, answer.send)
                else:
                    await self._app(scope, receive, answer.send)
        except ClientDisconnect:
            pass
        except Exception:  # the last line: logged here, and no word of it to the client
            log.exception("request failed", path=scope["path"], request_id=answer.request_id)
            if not answer.ended:
                raise  # the server closes the connection, so that half an answer is not taken for a whole
        finally:
            self.open -= 1
            if not self.open:
                self.idle.set()


class _Answer:
    """Sends an answer, with the request's id among its headers."""

    def __init__(self, send: Send, request_id: str, responded: Callable[[int], None]) -> None:
        self.request_id = request_id
        self._responded = responded
        self.ended = False
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._responded(message["status"])
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        await self._send(message)
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)


def _request_id(scope: MutableMapping[str, Any]) -> str:
    """Return the id that the client gave, where it may stand in a header and in a log; else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
