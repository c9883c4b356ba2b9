"""The interface of every object store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from loramux_shared.faults import Fault, Status


class ObjectMissing(Fault, status=Status.NOT_FOUND):
    """A key that holds no object."""


@dataclass(frozen=True)
class Entry:
    """An object as a listing shows it."""

    key: str
    size: int
    """Bytes."""
    modified: datetime
    """When it was put, by the store's own clock; with a time zone."""


class Store(Protocol):
    """A flat map from keys (``a/b/c``) to immutable bytes.

    A put is atomic: a reader sees the whole object or none, also after a kill. Nothing is promised about
    conditional writes. Every method may block and raises `StoreUnavailable` when the store does not answer;
    the methods may be called from several threads at once.
    """

    uri: str
    """The address, without credentials."""

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Return an object's bytes.

        Args:
            key: Key of the object.
            bound: Bytes that it may have; by default `bounds.bound_of` its key.

        Raises:
            ObjectMissing: there is none.
            RecordTooLarge: it exceeds the bound; at most a byte more than that was read.
        """
        ...

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a key; an older object is replaced."""
        ...

    def take(self, key: str, file: Path) -> None:
        """Store a file's content under a key, and remove the file; a store in a folder moves it."""
        ...

    def sha256(self, key: str) -> str | None:
        """Return the sha256 of an object in hex, read back in pieces, or None when there is none."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with prefix, in lexicographic order.

        Raises:
            RecordTooLarge: they are more than `bounds.KEYS`.
        """
        ...

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield what `list` yields, with size and age."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        ...


def is_key(key: str) -> bool:
    """True for ``a/b/c``; not with an empty, ``.`` or ``..`` part, a control character, or no UTF-8."""
    parts = key.split("/")
    return {"", ".", ".."}.isdisjoint(parts) and not any(
        char < " " or "\ud800" <= char <= "\udfff" for char in key
    )


def checked_key(key: str) -> str:
    """Return a key as it is.

    Raises:
        ValueError: it is none.
    """
    if not is_key(key):
        raise ValueError(f"{key!r} is not a valid key: expected a/b/c, without empty parts, '.' and '..'")
    return key


def checked_prefix(prefix: str) -> str:
    """Return the beginning of a key as it is; ``a/b``, ``a/`` and nothing are some.

    Raises:
        ValueError: no key begins like this.
    """
    checked_key(f"{prefix}x")
    return prefix
