"""A store in a folder."""

import errno
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from loramux_shared.faults import StoreUnavailable
from loramux_shared.storage.base import (
    Entry,
    ObjectMissing,
    bound_of,
    bounded_keys,
    check_size,
    checked_key,
    checked_prefix,
    is_key,
    read_bounded,
)

TEMPORARY = ".tmp"
TEMPORARY_LIFE_S = 24 * 3600
"""A temporary file that was not written for so long belongs to a process that was killed."""

MODE = 0o644
"""Other users of this machine may serve what is stored."""

# No object: nothing there, a folder there, or a file in the place of a folder.
_NO_OBJECT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class LocalStore:
    """Objects as files below a root; a put writes a temporary file there and renames it.

    Links below the root are not followed: a store shows what it holds and nothing else.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root.expanduser()))  # a loop of links fails at its first use
        self._temporary = self._root / TEMPORARY
        self.uri = f"file://{self._root}"
        self._remove_leftovers()

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Return an object's bytes, or raise `ObjectMissing` or `RecordTooLarge`."""
        with self._translated("read", key):
            try:
                with self._path(key).open("rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    return read_bounded(self.uri, key, file.read, bound_of(key, bound), size)
            except _NO_OBJECT:
                raise ObjectMissing(f"{self.uri}: no object {key!r}") from None

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a key; it is on disk when this returns."""
        if isinstance(data, bytes):
            check_size(self.uri, key, len(data), bound_of(key))
        # A source that cannot be opened is no fault of the store.
        with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as source:
            self._put(key, source)

    def _put(self, key: str, source: BinaryIO) -> None:
        with self._translated("write", key):
            path = self._path(key)
            self._make_folder(self._temporary)
            self._make_folder(path.parent)
            with tempfile.NamedTemporaryFile(dir=self._temporary, delete=False) as file:
                try:
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                    Path(file.name).chmod(MODE)
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            _sync_folder(path.parent)

    def take(self, key: str, file: Path) -> None:
        """Store a file's content under a key, and remove the file: by a rename where the disk is the same."""
        with file.open("rb") as source:
            if not self._moved(key, file, source):
                self._put(key, source)
                file.unlink()

    def _moved(self, key: str, file: Path, source: BinaryIO) -> bool:
        with self._translated("write", key):
            path = self._path(key)
            self._make_folder(path.parent)
            if path.parent.stat().st_dev != os.fstat(source.fileno()).st_dev:
                return False
            os.fchmod(source.fileno(), MODE)
            os.utime(source.fileno())  # the age of an object counts from its put
            os.fsync(source.fileno())
            try:
                file.replace(path)
            except OSError as error:
                if error.errno == errno.EXDEV:  # one device, but several mounts
                    return False
                raise
            _sync_folder(path.parent)
        return True

    def sha256(self, key: str) -> str | None:
        """Return the sha256 of an object in hex, read back in pieces, or None when there is none."""
        with self._translated("read", key):
            try:
                with self._path(key).open("rb") as source:
                    return hashlib.file_digest(source, "sha256").hexdigest()
            except _NO_OBJECT:
                return None

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with prefix, in lexicographic order."""
        folder = checked_prefix(prefix).rpartition("/")[0]
        with self._translated("list", prefix):
            top = self._path(folder) if folder else self._root
            found = (key for key in self._keys_below(top) if key.startswith(prefix) and is_key(key))
            keys = sorted(bounded_keys(self.uri, prefix, found))
        yield from keys

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield what `list` yields, with size and age."""
        for key in self.list(prefix):
            with self._translated("read", key):
                try:
                    status = self._path(key).stat()
                except _NO_OBJECT:  # deleted meanwhile
                    continue
            yield Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        with self._translated("delete", key), suppress(*_NO_OBJECT):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        if checked_key(key).split("/")[0] == TEMPORARY:
            raise ValueError(f"{key!r} is not a valid key: {TEMPORARY} is reserved for temporary files")
        path = self._root / key
        if os.path.realpath(path) != str(path):
            raise StoreUnavailable(
                f"{self.uri}: {key!r} goes through a link, and links are not followed. "
                "Mount the folder there, or move the whole store."
            )
        return path

    def _keys_below(self, top: Path) -> Iterator[str]:
        for folder, folders, files in os.walk(top, onerror=_unless_missing):
            if Path(folder) == self._root and TEMPORARY in folders:
                folders.remove(TEMPORARY)
            for path in (Path(folder, file) for file in files):
                if path.is_file() and not path.is_symlink():
                    yield path.relative_to(self._root).as_posix()

    def _make_folder(self, folder: Path) -> None:
        if folder == self._root or not folder.is_relative_to(self._root):
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)

    def _remove_leftovers(self) -> None:
        with suppress(OSError):  # a reader may not write here, and has no need to
            for path in self._temporary.iterdir():
                if path.stat().st_mtime < time.time() - TEMPORARY_LIFE_S:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(
                f"{self.uri}: cannot {verb} {key!r}: {error.strerror or type(error).__name__}. "
                "Check the folder's free space, owner and mount."
            ) from error


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
