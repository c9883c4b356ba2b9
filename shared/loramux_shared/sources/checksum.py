"""The checksum of a file in a listing, beside its size, and its verification."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from loramux_shared.adapter_files import pieces_of
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.sources.base import SourceFile, unwatched
from loramux_shared.sources.files import ended, hash_pieces


def md5_of(value: str | bytearray | None) -> str:
    """Return the checksum of a listing that gives an MD5, in base64 or as bytes; else nothing."""
    digest = base64.b64decode(value) if isinstance(value, str) else value or b""
    return f"md5:{digest.hex()}" if digest else ""


def checked_file(path: Path, listed: SourceFile) -> tuple[FileDigest, str]:
    """Return what a file is, and how it differs from its listing; nothing where it does not."""
    check = Checksum(listed)
    found = hash_pieces(check.of(pieces_of(path)), unwatched)
    return found, check.problem(found)


class Checksum:
    """Compares a file that passes by with what its listing says of it."""

    def __init__(self, listed: SourceFile) -> None:
        self._listed = listed
        kind, _, self._expected = listed.checksum.partition(":")
        # What others chose long ago; it finds accidents, as theirs does.
        name = "md5" if kind == "md5" else "sha256" if len(self._expected) == 64 else "sha1"
        self._hash = hashlib.new(name, usedforsecurity=False) if kind else None
        if self._hash is not None and kind == "git":
            self._hash.update(b"blob %d\0" % listed.size)

    def of(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the pieces, and look at them."""
        with ended(pieces):
            for piece in pieces:
                if self._hash is not None:
                    self._hash.update(piece)
                yield piece

    def problem(self, found: FileDigest) -> str:
        """Return how the whole file, which was found to be this, differs; nothing where it does not."""
        listed = self._listed
        if found.size != listed.size:
            return f"expected {listed.size} bytes, found {found.size}"
        if listed.sha256 and found.sha256 != listed.sha256:
            return f"expected sha256 {listed.sha256}, found {found.sha256}"
        if self._hash is not None and (actual := self._hash.hexdigest()) != self._expected:
            return f"expected {listed.checksum}, found {actual}"
        return ""
