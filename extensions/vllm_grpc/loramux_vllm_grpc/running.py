"""Requests under way, which those who sent them may end by their ids."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager

from inference_service.serving.request import Event
from loramux_shared.access.keys import ACCESS


class Call:
    """One of them."""

    def __init__(self) -> None:
        self.aborted = False
        self._waiting: asyncio.Timeout | None = None

    def abort(self) -> None:
        """End it: its events stop."""
        self.aborted = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def until_aborted(self, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        """Yield events as long as nobody ends the call, and close them then."""
        async with aclosing(events):
            while not self.aborted:
                try:
                    event = await self._next(events)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if not self.aborted:
                        raise
                    return
                yield event

    async def _next(self, events: AsyncGenerator[Event]) -> Event:
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await anext(events)
        finally:
            self._waiting = None


class Running:
    """The calls of all services of a replica. Used on the event loop alone."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str], list[Call]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._calls.values()))

    @contextmanager
    def call(self, request_id: str) -> Iterator[Call]:
        """Have a call known by the id of its request while the block runs; several may have the same."""
        call, key = Call(), (ACCESS.get().key_id, request_id)
        calls = self._calls.setdefault(key, [])
        calls.append(call)
        try:
            yield call
        finally:
            calls.remove(call)
            if not calls:
                del self._calls[key]

    def abort(self, request_ids: Iterable[str]) -> None:
        """End the calls of these ids that came with the same key; others are nobody's business here."""
        key_id = ACCESS.get().key_id
        for request_id in request_ids:
            for call in tuple(self._calls.get((key_id, request_id), ())):
                call.abort()
