"""A store whose user dies at one of its operations, as far as one process can show kill -9."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from loramux_shared.storage.base import Entry
from loramux_shared.storage.memory import MemoryStore

T = TypeVar("T")


class Killed(BaseException):
    """The end of the process."""


def copied(store: MemoryStore) -> MemoryStore:
    """Return a store with the same objects, all of them put long ago."""
    made = MemoryStore()
    made.objects.update(store.objects)
    return made


class Mortal:
    """A store whose user dies at its n-th operation: before it took effect, or after, without an answer."""

    def __init__(self, store: MemoryStore, dies_at: int = 0, *, after: bool = False) -> None:
        self.store, self.uri = store, store.uri
        self.dies_at, self.after = dies_at, after
        self.count = 0
        self._lock = threading.Lock()

    @property
    def dead(self) -> bool:
        """Return True if no operation of the dead process has an effect any longer."""
        return 0 < self.dies_at <= self.count

    def _lives(self, operation: Callable[[], T]) -> T:
        with self._lock:
            if self.dead:
                raise Killed
            self.count += 1
            if self.dead and not self.after:
                raise Killed
            result = operation()
            if self.dead:
                raise Killed
            return result

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Read, if alive."""
        return self._lives(lambda: self.store.get(key, bound))

    def put(self, key: str, data: bytes | Path) -> None:
        """Write, if alive."""
        self._lives(lambda: self.store.put(key, data))

    def take(self, key: str, file: Path) -> None:
        """Move, if alive."""
        self._lives(lambda: self.store.take(key, file))

    def sha256(self, key: str) -> str | None:
        """Look, if alive."""
        return self._lives(lambda: self.store.sha256(key))

    def list(self, prefix: str) -> Iterator[str]:
        """List, if alive."""
        return iter(self._lives(lambda: [*self.store.list(prefix)]))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """List, if alive."""
        return iter(self._lives(lambda: [*self.store.entries(prefix)]))

    def delete(self, key: str) -> None:
        """Remove, if alive."""
        self._lives(lambda: self.store.delete(key))
