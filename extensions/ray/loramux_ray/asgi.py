"""An HTTP request that a proxy handed on, answered by the application of a replica."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message

from inference_service.api.http.wire.refusals import fault_response
from loramux_ray.calls import HttpCall, Messages, require_local
from loramux_shared.faults import PermissionDenied


async def answered(app: ASGIApp, call: HttpCall, *, local_only: bool) -> AsyncGenerator[Messages]:
    """Yield what an application sends: its status together with the first of the body, so as to be retried."""
    sent: asyncio.Queue[Messages | None] = asyncio.Queue()
    held: Messages = []
    requests: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def send(message: Message) -> None:
        held.append(dict(message))
        if message["type"] != "http.response.start":
            sent.put_nowait(held.copy())
            held.clear()

    async def run() -> None:
        try:
            await _guarded(app, call, local_only)(dict(call.scope), receive, send)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (messages := await sent.get()) is not None:
            yield messages
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _guarded(app: ASGIApp, call: HttpCall, local_only: bool) -> Any:
    if not local_only:
        return app
    try:
        require_local(call.peer)
    except PermissionDenied as fault:
        return fault_response(call.scope, fault)
    return app
