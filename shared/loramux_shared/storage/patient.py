"""A store that is asked again when it does not answer."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import structlog

from loramux_shared.faults import StoreUnavailable
from loramux_shared.storage.base import Entry, Store

log = structlog.get_logger()

T = TypeVar("T")

PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0)
"""Between five tries, on top of what the store's own client does."""
_TICK_S: Final = 0.1


class PatientStore:
    """Tries each operation a few times; all of them may be repeated.

    check is called while it waits; what it raises ends the waiting.
    """

    def __init__(
        self, store: Store, check: Callable[[], None] = lambda: None, pauses_s: tuple[float, ...] = PAUSES_S
    ) -> None:
        self._store = store
        self._check = check
        self._pauses_s = pauses_s
        self.uri = store.uri

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Return an object's bytes, or raise `ObjectMissing` or `RecordTooLarge`."""
        return self._tried(lambda: self._store.get(key, bound))

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a key."""
        self._tried(lambda: self._store.put(key, data))

    def take(self, key: str, file: Path) -> None:
        """Store a file's content under a key, and remove the file."""
        self._tried(lambda: self._store.take(key, file))

    def sha256(self, key: str) -> str | None:
        """Return the sha256 of an object in hex, or None when there is none."""
        return self._tried(lambda: self._store.sha256(key))

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with prefix, in lexicographic order."""
        yield from self._tried(lambda: [*self._store.list(prefix)])

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield what `list` yields, with size and age."""
        yield from self._tried(lambda: [*self._store.entries(prefix)])

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        self._tried(lambda: self._store.delete(key))

    def _tried(self, operation: Callable[[], T]) -> T:
        for pause_s in self._pauses_s:
            self._check()
            try:
                return operation()
            except StoreUnavailable as fault:
                log.warning("store does not answer, retrying", pause_s=pause_s, problem=fault.message)
                self._wait(pause_s)
        return operation()

    def _wait(self, pause_s: float) -> None:
        end = time.monotonic() + pause_s
        while (left := end - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, _TICK_S))
