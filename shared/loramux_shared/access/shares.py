"""Shares of what is scarce, by API key: a key that has much leaves places for the others."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

from loramux_shared.faults import QueueFull


def is_in_share(key_id: str, held: int, free: int) -> bool:
    """Return True if a key that holds so many places, the new ones included, leaves enough of them free.

    A key takes a place while it holds fewer than are free: "Dynamic queue length thresholds for shared-memory
    packet switches", Choudhury and Hahne, 1998. One key has at most half of all places, k busy ones come to one
    part of k + 1 each, and the next one finds a place at once. Calls without a key, whose id is empty, are one
    caller that may have all.
    """
    return not key_id or held <= free + 1


class Shares:
    """A number of places that keys share; used on one thread."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0
        """Places that are taken."""
        self._held = Counter[str]()
        self._freed = asyncio.Event()

    def may_take(self, key_id: str) -> bool:
        """Return True if a place is free for a key."""
        free = self.places - self.taken - 1
        return free >= 0 and is_in_share(key_id, self._held[key_id] + 1, free)

    def take(self, key_id: str) -> None:
        """Take a place, whether it is free or not."""
        self.taken += 1
        self._held[key_id] += 1

    def give_back(self, key_id: str) -> None:
        """Give a place back."""
        self.taken -= 1
        self._held[key_id] -= 1
        if not self._held[key_id]:
            del self._held[key_id]
        self._freed.set()
        self._freed = asyncio.Event()

    @contextmanager
    def held(self, key_id: str, what: str) -> Generator[None]:
        """Hold a place within the block; raise QueueFull where none is free, what being what places are for."""
        if not self.may_take(key_id):
            why = "this key has its share of" if self.taken < self.places else "there is none free of"
            raise QueueFull(f"{why} {self.places} places for {what}. Retry in a moment.")
        self.take(key_id)
        try:
            yield
        finally:
            self.give_back(key_id)

    @asynccontextmanager
    async def awaited(self, key_id: str, what: str) -> AsyncGenerator[None]:
        """Hold a place within the block, and wait for it."""
        while not self.may_take(key_id):
            await self._freed.wait()
        with self.held(key_id, what):
            yield
