"""The interface of every object store, and the bounds of objects and listings.

A store need not be trusted: an object of any size can be under any key. No digest and no signature is verified
before the bytes are in memory, so the size is checked first, and while an object is read.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol, TypeVar

from loramux_shared.faults import Fault, RecordTooLarge, Status


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
        """Yield the keys that begin with prefix, in lexicographic order; raise RecordTooLarge above `KEYS`."""
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
    """Return a key as it is; raise ValueError for what is no key."""
    if not is_key(key):
        raise ValueError(f"{key!r} is not a valid key: expected a/b/c, without empty parts, '.' and '..'")
    return key


def checked_prefix(prefix: str) -> str:
    """Return the beginning of a key as it is, ``a/b``, ``a/`` or nothing; raise ValueError for others."""
    checked_key(f"{prefix}x")
    return prefix


T = TypeVar("T")

KIB: Final = 1 << 10
MIB: Final = 1 << 20

RECORD_BYTES: Final = 64 * MIB
"""A generation, a manifest, and any object without a bound of its own: 50,000 adapters, or 90,000 rows."""
_KINDS: Final = (
    (re.compile(r"deployments/[^/]+/current\.json"), 4 * KIB),
    (re.compile(r"deployments/[^/]+/generations/[^/]+\.sig"), 256 * KIB),
    (re.compile(r"builds/.+"), 16 * MIB),
)
KEYS: Final = 4_000_000
"""Keys of one listing: with five files each, 800,000 bundles."""
PIECE: Final = MIB


def bound_of(key: str, bound: int | None = None) -> int:
    """Return how many bytes an object may have: an explicit bound, else that of its kind of record."""
    if bound is not None:
        return bound
    return next((size for kind, size in _KINDS if kind.fullmatch(key)), RECORD_BYTES)


def check_size(uri: str, key: str, size: int, bound: int) -> None:
    """Raise RecordTooLarge for an object of more bytes than its bound."""
    if size > bound:
        raise _too_large(uri, key, f"{size}", bound)


def read_bounded(uri: str, key: str, read: Callable[[int], bytes], bound: int, size: int | None) -> bytes:
    """Return an object's bytes: of `size`, where that is known before it is read.

    Args:
        uri: Address of the store, for the error.
        key: Key of the object, for the error.
        read: Returns at most so many of the next bytes; none at the end.
        bound: Bytes that the object may have.
        size: Its size in bytes, as the store reports it.

    Raises:
        RecordTooLarge: it exceeds the bound.
    """
    check_size(uri, key, size or 0, bound)
    pieces: list[bytes] = []
    found, size_left = 0, (PIECE if size is None else size) + 1  # one more byte: the end is found at once
    while piece := read(min(size_left, bound + 1 - found)):
        found += len(piece)
        if found > bound:
            raise _too_large(uri, key, f"more than {bound}", bound)
        pieces.append(piece)
        size_left = PIECE
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def bounded_keys(uri: str, prefix: str, keys: Iterable[T]) -> Iterator[T]:
    """Yield the keys or entries of a listing; raise RecordTooLarge for more than `KEYS`."""
    for number, key in enumerate(keys):
        if number >= KEYS:
            raise RecordTooLarge(
                f"{uri}: expected at most {KEYS} keys below {prefix!r}, found more. "
                "Remove what is not loramux's, and with `loramux gc` what nothing refers to."
            )
        yield key


def _too_large(uri: str, key: str, size: str, bound: int) -> RecordTooLarge:
    return RecordTooLarge(
        f"{uri}: {key}: expected at most {bound} bytes, found {size}. It is not used: no release of "
        f"loramux writes such a record. Check who can write to the store, and build the deployment again."
    )
