"""A store whose user dies at one of its operations, as far as one process can show kill -9."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from loramux_shared.storage.memory import MemoryStore

T = TypeVar("T")


class Killed(BaseException):
    """The end of the process."""


def copy_store(store: MemoryStore) -> MemoryStore:
    """Return a store with the same objects, all of them put long ago."""
    made = MemoryStore()
    made.objects.update(store.objects)
    return made


class StoreProxy:
    """A store whose operations all go through `act`, which does them or does not."""

    def __init__(self, store: MemoryStore) -> None:
        self.store, self.uri = store, store.uri

    def act(self, operation: Callable[[], T]) -> T:
        return operation()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self.act(lambda: _whole(getattr(self.store, name)(*arguments)))


def _whole(found: Any) -> Any:
    return iter([*found]) if isinstance(found, Iterator) else found


class DyingStore(StoreProxy):
    """A store whose user dies at its n-th operation: before it took effect, or after, without an answer."""

    def __init__(self, store: MemoryStore, dies_at: int = 0, *, after: bool = False) -> None:
        super().__init__(store)
        self.dies_at, self.after = dies_at, after
        self.count = 0
        self._lock = threading.Lock()

    @property
    def dead(self) -> bool:
        """Return True if no operation of the dead process has an effect any longer."""
        return 0 < self.dies_at <= self.count

    def act(self, operation: Callable[[], T]) -> T:
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
