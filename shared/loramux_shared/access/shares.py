"""Shares of what is scarce, by API key: a key that has much leaves places for the others."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager

from loramux_shared.faults import QueueFull


def is_in_share(key_id: str, held: Mapping[str, int], places: int) -> bool:
    """Return True if a key may take one more of so many places, of which keys hold some already.

    A key that has one leaves the last place to others, and has its part of all: the places divided by the keys
    that hold any. So a key that is alone has all but one, and the next key finds a place at once. Calls without
    a key, whose id is empty, are one caller that may have all.
    """
    own, keys = held.get(key_id, 0) + 1, len(held.keys() | {key_id})
    is_last = sum(held.values()) + 1 >= places
    return not key_id or own == 1 or (not is_last and own <= -(-places // keys))


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
        return self.taken < self.places and is_in_share(key_id, self._held, self.places)

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
