"""What every object store promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from shared.faults import Fault, Status


class ObjectMissing(Fault):
    """A key that holds no object."""

    reason = "OBJECT_MISSING"
    status = Status.NOT_FOUND


class Store(Protocol):
    """A flat map from keys (``a/b/c``) to immutable bytes.

    A put is atomic: a reader sees the whole object or none, also after a kill. Nothing is promised about
    conditional writes. Every method may block and raises `StoreUnavailable` when the store does not answer;
    the methods may be called from several threads at once.
    """

    uri: str
    """The address, without credentials."""

    def get(self, key: str) -> bytes:
        """Return an object's bytes, or raise `ObjectMissing`."""
        ...

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a key; an older object is replaced."""
        ...

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, or None when there is none."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with prefix, in lexicographic order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        ...
