"""Untrusted archives (tar.gz): a listing of their members, and single files of them."""

import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Final

from loramux_shared.adapter_files import PIECE
from loramux_shared.faults import SourceRefused
from loramux_shared.sources.base import MAX_FILES, Progress, SourceFile, unwatched
from loramux_shared.sources.files import hash_pieces, is_text

MAX_UNPACKED: Final = 1 << 30
MAX_RATIO: Final = 20
"""Unpacked to packed, above MAX_UNPACKED. Trained weights shrink by less than half, a bomb by a thousand."""
MAX_HEADER: Final = 64 << 10
"""Bytes of a member's headers together, long names and attributes among them: tarfile reads them whole."""
MAX_SHARED: Final = 4 << 10
"""Characters of the attributes that hold for all members: tarfile copies them for each. Git writes 50."""
MAX_NAME: Final = 1024
"""Characters of a member's name: a listing holds all of them."""
_MANY_DIGITS: Final = re.compile(rb"[0-9]{129}")
"""Digits in a header that tarfile takes the square of their number for, before Python 3.11.10 and 3.12.6."""


@dataclass(frozen=True)
class Archive:
    """An archive in a file of ours."""

    file: IO[bytes]
    name: str
    """For messages."""
    size: int
    max_unpacked: int = MAX_UNPACKED
    plain: bool = False
    """Whether the archive may be a tar that is not compressed."""
    start: int = 0
    """Place in the file, which may hold several archives."""

    def listing(self, progress: Progress = unwatched, under: str = "") -> dict[str, SourceFile]:
        """Return every file by its name in the archive, with its digest; under leaves out other folders.

        Raises:
            SourceRefused: it is no tar.gz, is damaged, unpacks to too much, or has a member that is
                neither a file nor a folder inside the archive.
        """
        files: dict[str, SourceFile] = {}
        for member, pieces in self._members(progress, under):
            if member.name in files:
                raise SourceRefused(f"{self.name}: {member.name!r} appears twice")
            digest = hash_pieces(pieces, unwatched)
            files[member.name] = SourceFile(digest.size, digest.sha256)
        return files

    def read(
        self, names: Mapping[str, str], progress: Progress = unwatched
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the pieces of these files in the archive's order, with what the mapping calls them."""
        left = dict(names)
        for member, pieces in self._members(progress):
            if member.name in left:
                yield left.pop(member.name), pieces
            if not left:
                return

    def _members(
        self, progress: Progress, under: str = ""
    ) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
        plain = self.plain and os.pread(self.file.fileno(), 2, self.start) != b"\x1f\x8b"
        raw = _Pieces(self.file, self.start, self.start + self.size)
        with _refused(self.name), raw if plain else gzip.GzipFile(fileobj=raw, mode="rb") as packed:
            most = max(self.max_unpacked, MAX_RATIO * self.size)
            stream = _Forward(packed, most, self.name, progress)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for count, member in enumerate(iter(tar.next, None)):
                    stream.headers = 0
                    # tarfile keeps them, each with its attributes; typeshed does not name the list.
                    tar.members.clear()  # type: ignore[attr-defined]
                    if count == MAX_FILES:
                        raise SourceRefused(f"{self.name}: more than {MAX_FILES} files and folders")
                    self._check_shared(tar.pax_headers)
                    if not member.name.removeprefix("./").startswith(under):
                        continue
                    member.name = self._checked(member)
                    if member.isreg():
                        yield member, stream.take(member.offset_data, member.size)
            stream.drain()

    def _check_shared(self, attributes: Mapping[str, str]) -> None:
        if sum(len(key) + len(value) for key, value in attributes.items()) > MAX_SHARED:
            raise SourceRefused(
                f"{self.name}: attributes of all members of more than {MAX_SHARED} characters. "
                "Pack it with `tar -czf`."
            )

    def _checked(self, member: tarfile.TarInfo) -> str:
        """Return a member's name without ``./``, or raise `SourceRefused`."""
        parts, name = PurePosixPath(member.name).parts, repr(member.name[:200])
        if member.name.startswith("/") or ".." in parts or set("\\\0") & set(member.name):
            raise SourceRefused(f"{self.name}: {name} leads outside of the archive")
        if not (member.isdir() or member.isreg()) or member.issparse():
            raise SourceRefused(
                f"{self.name}: {name} is neither a file nor a folder: links and devices are refused"
            )
        if member.size < 0 or (member.isreg() and not parts):
            raise SourceRefused(f"{self.name}: {name} has no valid header")
        if len(member.name) > MAX_NAME:
            raise SourceRefused(f"{self.name}: {name}: a name of more than {MAX_NAME} characters")
        return "/".join(parts)


class _Pieces(io.RawIOBase):
    """A part of a file, with a position of its own."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        super().__init__()
        self._file = file
        self._position = start
        self._end = end

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        left = self._end - self._position
        data = os.pread(self._file.fileno(), min(size, left) if size >= 0 else left, self._position)
        self._position += len(data)
        return data


class _Forward(io.RawIOBase):
    """A compressed file that is read once from its beginning, up to a limit."""

    def __init__(self, packed: io.RawIOBase | gzip.GzipFile, most: int, name: str, progress: Progress) -> None:
        super().__init__()
        self._packed = packed
        self._most = most
        self._name = name
        self._progress = progress
        self._position = 0
        self.headers = 0
        """Bytes of headers that were read for the next member."""

    def read(self, size: int = -1) -> bytes:
        """Return bytes of a member's headers."""
        if not 0 <= size <= MAX_HEADER - self.headers:
            raise SourceRefused(f"{self._name}: a header of more than {MAX_HEADER} bytes")
        self.headers += size
        data = self._read(size)
        if _MANY_DIGITS.search(data):
            raise SourceRefused(f"{self._name}: a header with more than 128 digits in a row")
        return data

    def _read(self, size: int) -> bytes:
        data = bytearray()
        with _refused(self._name):
            while len(data) < size and (piece := self._packed.read(size - len(data))):
                data += piece
        self._position += len(data)
        self._progress(0)
        if self._position > self._most:
            raise SourceRefused(f"{self._name}: unpacks to more than {self._most} bytes, the limit")
        return bytes(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go forward."""
        if whence != io.SEEK_SET or offset < self._position:
            raise SourceRefused(f"{self._name}: its headers point backwards")
        while self._position < offset and self._read(min(PIECE, offset - self._position)):
            pass
        return self._position

    def tell(self) -> int:
        """Return the position in what was unpacked."""
        return self._position

    def take(self, start: int, size: int) -> Iterator[bytes]:
        """Yield a member's bytes."""
        self.seek(start)
        while size:
            piece = self._read(min(PIECE, size))
            if not piece:
                raise _damaged(self._name)
            size -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read to the end, where the checksum is."""
        while self._read(PIECE):
            pass


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        ValueError,
        OverflowError,
        RecursionError,
    ):
        raise _damaged(name) from None


def _damaged(name: str) -> SourceRefused:
    return SourceRefused(f"{name}: not a tar.gz archive, or damaged. Pack it with `tar -czf`.")


def inner_files(files: Mapping[str, SourceFile], subfolder: str) -> dict[str, str]:
    """Return the names in the archive by the names in a subfolder of it.

    An archive that holds one folder and nothing beside it is taken as that folder. Hidden files are not
    listed: archivers of some systems add them. Nor are names that are no UTF-8.
    """
    plain = [name for name in files if is_text(name) and not re.search(r"(^|/)\.", name)]
    tops = {name.partition("/")[0] for name in plain}
    top = f"{next(iter(tops))}/" if len(tops) == 1 and all("/" in name for name in plain) else ""
    inner = f"{subfolder}/" if subfolder else ""
    for prefix in dict.fromkeys((top + inner, inner)) if inner else (top,):
        if found := {name.removeprefix(prefix): name for name in plain if name.startswith(prefix)}:
            return found
    return {}
