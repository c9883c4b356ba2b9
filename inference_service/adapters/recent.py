"""A cache of the most recently used values, up to a bound."""

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by digest, each with a size; those that were not used for longest leave. For many threads."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._lock = threading.Lock()
        self._values: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def size(self) -> int:
        """Return the size of all values together, never above the bound."""
        return self._size

    def get(self, digest: str) -> V | None:
        """Return a value, which is now the one that was used last."""
        with self._lock:
            if digest not in self._values:
                return None
            self._values.move_to_end(digest)
            return self._values[digest][0]

    def put(self, digest: str, value: V, size: int = 1) -> None:
        """Keep a value, unless it is larger than the bound."""
        with self._lock:
            self._leave(digest)
            if size > self._bound:
                return
            self._values[digest] = (value, size)
            self._size += size
            while self._size > self._bound:
                self._leave(next(iter(self._values)))

    def drop(self, digest: str) -> None:
        """Let a value go."""
        with self._lock:
            self._leave(digest)

    def _leave(self, digest: str) -> None:
        if digest in self._values:
            self._size -= self._values.pop(digest)[1]
