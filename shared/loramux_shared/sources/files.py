"""Writing, copying and hashing of files, in pieces."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Final

import structlog

from loramux_shared.adapter_files import pieces_of
from loramux_shared.bundle.manifest import FileDigest, sha256_hex
from loramux_shared.deployment import Repository
from loramux_shared.faults import ResourcesExhausted, RevisionNotFound, SourceRefused, SourceUnavailable
from loramux_shared.process import working_folder
from loramux_shared.sources.base import Progress, SourceFile, unwatched


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
        # The hash is the source's choice; it detects accidents, not attacks.
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


log = structlog.get_logger()

PART: Final = ".part-"
"""Begins the name of a file that is being written."""
SCRATCH: Final = "loramux-build-scratch-"
"""Begins as the builder's work folders do, which are swept at its start."""


def hash_if_there(
    path: Path, progress: Progress = unwatched, sink: IO[bytes] | None = None
) -> FileDigest | None:
    """Return what a file is, and copy it where a sink is given.

    Nothing where none is, or where another process takes it away meanwhile.
    """
    try:
        return hash_pieces(pieces_of(path), progress, sink) if path.is_file() else None
    except FileNotFoundError:
        return None


def hash_pieces(pieces: Iterable[bytes], progress: Progress, sink: IO[bytes] | None = None) -> FileDigest:
    """Return what pieces together are, and write them where a sink is given."""
    digest, size = hashlib.sha256(), 0
    with ended(pieces):
        for piece in pieces:
            progress(len(piece))
            digest.update(piece)
            size += len(piece)
            if sink is not None:
                with disk_errors():
                    sink.write(piece)
    return FileDigest(size=size, sha256=digest.hexdigest())


def exactly(pieces: Iterable[bytes], size: int, name: str) -> Iterator[bytes]:
    """Yield pieces of that many bytes together; raise `SourceUnavailable` before the first byte too much."""
    left = size
    with ended(pieces):
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise SourceUnavailable(f"{name}: expected {size} bytes, found more. Retry.")
            yield piece
    if left:
        raise SourceUnavailable(f"{name}: expected {size} bytes, found {size - left}. Retry.")


@contextmanager
def ended(pieces: Iterable[bytes]) -> Iterator[None]:
    """End a generator with the loop over it: a failure whose traceback is kept would keep its file open."""
    try:
        yield
    finally:
        if isinstance(pieces, Generator):
            pieces.close()


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file by its name in a listing, or raise `SourceRefused` where it leads outside."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or set("\\\0") & set(name) or not is_text(name):
        raise SourceRefused(f"{name[:200]!r}: not a path inside the repository")
    return folder.joinpath(*parts)


def is_text(name: str) -> bool:
    """True unless a name has parts that are no UTF-8: a disk's bytes, or half of a JSON escape."""
    return not re.search("[\ud800-\udfff]", name)


@contextmanager
def whole(target: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name when it is whole, and not at all otherwise."""
    with disk_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=PART)
    try:
        with ExitStack() as opened:
            yield closed_with(opened, os.fdopen(descriptor, "wb"))
        with disk_errors():
            Path(name).replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def closed_with(opened: ExitStack, file: IO[bytes]) -> IO[bytes]:
    """Have a file closed, and what it has not written yet named where that does not fit the disk."""

    def close() -> None:
        with disk_errors():
            file.close()

    opened.callback(close)
    return file


@contextmanager
def scratch(place: Path | None) -> Iterator[Path]:
    """Yield a folder below a place (the system's when not given) that is removed at the end."""
    with ExitStack() as folders:
        with disk_errors():
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
            folder = folders.enter_context(working_folder(SCRATCH, place))
        yield folder


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what the disk refuses into `ResourcesExhausted`."""
    try:
        yield
    except OSError as error:
        raise disk_fault(error) from error


def disk_fault(error: OSError) -> ResourcesExhausted:
    """Return the fault for a file that cannot be written; the log alone says which."""
    log.warning("disk operation failed", path=str(error.filename or ""), problem=error.strerror)
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        cure = "Free or add space."
    elif error.errno == errno.EFBIG:
        cure = "Let the server write larger files: `ulimit -f`."
    elif error.errno in {errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOTDIR}:
        cure = "Remove the file or folder in its place; the log names it."
    else:
        cure = "Let the server write to its folder."
    return ResourcesExhausted(
        f"a fetched file cannot be written: {error.strerror or type(error).__name__}. {cure}"
    )


def content_digest(files: Mapping[str, FileDigest]) -> str:
    """Return one digest of files by name: the revision of a repository that has no commits."""
    listing = {name: file.sha256 for name, file in files.items()}
    return sha256_hex(json.dumps(listing, sort_keys=True, separators=(",", ":")).encode())


def pin_content(repository: Repository, files: Mapping[str, FileDigest]) -> Repository:
    """Return a repository without commits with the digest of its files as revision; raise RevisionNotFound for
    another.
    """
    expected, revision = repository.revision, content_digest(files)
    if expected and expected != revision:
        raise RevisionNotFound(
            f"{repository.source} {repository.label}: expected content {expected}, found {revision}. "
            "Leave revision out to take the folder as it is."
        )
    return repository.model_copy(update={"revision": revision})
