"""The first layer of every request: its id, the drain, and the last line of defence."""

import asyncio
import contextlib
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any, Final

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from inference_service.api.http.wire.refusals import REQUEST_ID, fault_response, is_messages
from loramux_shared.arrival import ARRIVED_S
from loramux_shared.faults import ShuttingDown
from loramux_shared.routes import HEALTH, PING
from loramux_shared.wording import SANE_ID

log = structlog.get_logger()
ARRIVED: Final = "arrived_s"
"""Key of a scope's state: when the request came."""
DRAINING: Final = "the server is shutting down and takes no new requests. Retry with another replica."
HEALTH_PATHS: Final = (HEALTH.path, PING.path)
CUT: Final = "the server shut down before the answer was complete. Retry with another replica."


class Front:
    """Ends every request once, counts those that are open, and lets none in while it drains."""

    def __init__(self, app: ASGIApp, responded: Callable[[int], None]) -> None:
        """Stand before an application; responded hears the status of every answer."""
        self._app = app
        self._responded = responded
        self.draining = self.leaving = False
        self._open: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """Requests that were let in and have not ended."""
        return len(self._open)

    async def until_idle(self, timeout_s: float) -> bool:
        """Wait until no request is open; False when the time ran out."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    def cut(self) -> None:
        """End what is open with SHUTTING_DOWN; new requests are refused already."""
        for task in self._open:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        answer = _Answer(send, _request_id(scope), self._responded, anthropic=is_messages(scope["path"]))
        scope.setdefault("state", {})[REQUEST_ID] = answer.request_id
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        if not self.draining:  # a drain does not wait for requests that are refused at once
            self._open.add(task)
            self._idle.clear()
        ARRIVED_S.set(scope.get("state", {}).get(ARRIVED))
        try:
            with bound_contextvars(request_id=answer.request_id):
                if self.draining or (self.leaving and scope["path"] in HEALTH_PATHS):
                    await fault_response(scope, ShuttingDown(DRAINING))(scope, receive, answer.send)
                else:
                    await self._app(scope, receive, answer.send)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not self.draining or answer.begun:
                raise
            task.uncancel()
            await fault_response(scope, ShuttingDown(CUT))(scope, receive, answer.send)
        except Exception:  # the last resort: logged here, and the client gets no detail
            log.exception("request failed: unexpected error", path=scope["path"], request_id=answer.request_id)
            if not answer.ended:
                raise  # the server closes the connection, so that half an answer is not taken for a whole
        finally:
            self._open.discard(task)
            if not self._open:
                self._idle.set()


class _Answer:
    """Sends an answer, with the request's id among its headers."""

    def __init__(
        self, send: Send, request_id: str, responded: Callable[[int], None], *, anthropic: bool
    ) -> None:
        self.request_id = request_id
        self._names = (b"x-request-id", b"request-id") if anthropic else (b"x-request-id",)
        self._responded = responded
        self.begun = self.ended = False
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._responded(message["status"])
            named = [(name, self.request_id.encode()) for name in self._names]
            headers = [*message.get("headers", ()), *named]
            message = {**message, "headers": headers}
        await self._send(message)
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)


def _request_id(scope: MutableMapping[str, Any]) -> str:
    """Return the id that the client gave, where it may stand in a header and in a log; else a new one."""
    request_id = Headers(scope=scope).get("x-request-id", "")
    return request_id if SANE_ID.fullmatch(request_id) else uuid.uuid4().hex
