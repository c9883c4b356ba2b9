"""Several streams of events as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from inference_service.serving.request import Event


async def merged(streams: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[tuple[int, Event]]:
    """Yield the events of all streams, each with its stream's number, in the order in which they come.

    The first failure of one ends all; nothing runs on when this is closed.
    """
    arrived: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    arrived.put_nowait((number, event))
        except Exception as error:  # noqa: BLE001 - raised below, where somebody waits for it
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
