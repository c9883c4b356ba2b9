"""Size bounds of objects and listings, which hold before an object is read and while it is read.

A store need not be trusted: an object of any size can be under any key. No digest and no signature is verified
before the bytes are in memory, so the size is checked first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

from loramux_shared.faults import RecordTooLarge

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
JOURNAL_BYTES: Final = 256 * MIB
"""All entries of a builder's journal together."""
KEYS: Final = 4_000_000
"""Keys of one listing: with five files each, 800,000 bundles."""
PIECE: Final = MIB


def bound_of(key: str, bound: int | None = None) -> int:
    """Return how many bytes an object may have: an explicit bound, else that of its kind of record."""
    if bound is not None:
        return bound
    return next((size for kind, size in _KINDS if kind.fullmatch(key)), RECORD_BYTES)


def check_size(uri: str, key: str, size: int, bound: int) -> None:
    """Check the size in bytes of an object.

    Raises:
        RecordTooLarge: it exceeds the bound.
    """
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
    """Yield the keys or entries of a listing.

    Raises:
        RecordTooLarge: they are more than `KEYS`.
    """
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
