"""Streams of server-sent events whose first event is late."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from inference_service.api.http.wire.reply import DONE, HEARTBEAT, Head, open_stream
from loramux_shared.faults import AdapterInvalid
from tests.support.waiting import bounded


class Client:
    """Notes what a server sends, and is gone when it says so."""

    def __init__(self) -> None:
        self.gone, self.heard = asyncio.Event(), asyncio.Event()
        self.sent: list[bytes] = []

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if body := message.get("body"):
            self.sent.append(body)
            self.heard.set()


class Late:
    """A body that waits, and whether it was closed."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.ready, self.closed, self._fault = asyncio.Event(), False, fault

    async def bodies(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield one event, or raise a fault."""
        try:
            if await self.ready.wait() and self._fault is not None:
                raise self._fault
            yield {"n": 1}
        finally:
            self.closed = True


@pytest.mark.parametrize("fault", [None, AdapterInvalid("no LoRA")])
async def test_a_late_stream_begins_with_comments(fault: Exception | None) -> None:
    """The event, or the fault, follows the comments."""
    client, late = Client(), Late(fault)
    stream = await open_stream(client.receive, late.bodies(), Head("id", "m"), heartbeat_s=0)
    sending = asyncio.ensure_future(stream({}, client.receive, client.send))
    async with bounded("the end of the stream"):
        await client.heard.wait()
        late.ready.set()
        await sending
    sent = [part for part in client.sent if part != HEARTBEAT]
    assert client.sent[0] == HEARTBEAT
    assert late.closed
    assert sent == [b'data: {"n":1}\n\n', DONE] if fault is None else b"no LoRA" in sent[0] and len(sent) == 1


@pytest.mark.parametrize("opened", [False, True])
async def test_a_client_that_leaves_before_the_first_event_ends_the_work(opened: bool) -> None:
    """The work ends before and after the stream began with comments."""
    client, late = Client(), Late()

    async def answer() -> None:
        heartbeat_s = 0.0 if opened else 60.0
        stream = await open_stream(client.receive, late.bodies(), Head("id", "m"), heartbeat_s=heartbeat_s)
        await stream({}, client.receive, client.send)

    answering = asyncio.ensure_future(answer())
    async with bounded("the end of the request"):
        if opened:
            await client.heard.wait()
        client.gone.set()
        with pytest.raises(ClientDisconnect):
            await answering
    assert late.closed
