"""Folders of fetched files: what they lack, and what stands where a file belongs."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

import structlog

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.sources.base import Progress, unwatched
from loramux_shared.sources.files import PART, SCRATCH, disk_errors, hash_if_there, inside

log = structlog.get_logger()

LOCK: Final = ".lock"
LOCK_POLL_S: Final = 0.1
PART_LIFE_S: Final = 24 * 3600
"""A part that was not written for so long belongs to a process that was killed."""


def missing_files(cache: Path, folder: Path, files: Mapping[str, FileDigest]) -> list[str]:
    """Return the files that a folder of the cache lacks, or has with another size.

    What is no folder on the way to them, or no file in their place, is removed, as far as it is in the cache.
    Raise ResourcesExhausted where it cannot be removed.
    """
    paths = {name: inside(folder, name) for name in files}
    with disk_errors():
        missing = [
            name
            for name, path in paths.items()
            if not (path.is_file() and path.stat().st_size == files[name].size)
        ]
        for name in missing:
            _clear(paths[name], cache)
    return missing


def differs(path: Path, expected: FileDigest, progress: Progress = unwatched) -> str:
    """Return what is at a path instead of a file, for a message; nothing where the file is there."""
    try:
        found = hash_if_there(path, progress)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    if found is None:
        return "no file"
    return "" if found == expected else f"{found.sha256} ({found.size} bytes)"


def discard(path: Path, cache: Path) -> bool:
    """Remove what is at a path, if that is in the cache and not where a link leads from it; False elsewhere.
    Raise ResourcesExhausted where it cannot be removed.
    """
    root = os.path.realpath(cache)
    if not Path(os.path.realpath(path.parent)).is_relative_to(root):
        return False
    with disk_errors():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return True


@contextmanager
def alone(cache: Path, progress: Progress = unwatched) -> Iterator[None]:
    """Let one process at a time change a cache; a cache that cannot be written is not locked.

    The lock ends with its process, however that ends. What progress raises ends the waiting.
    """
    try:
        file = (cache / LOCK).open("a")
    except OSError:
        yield
        return
    with file:
        reported = False
        while not _locked(file):
            if not reported:
                log.info("cache is locked by another process, waiting", cache=str(cache))
            reported = True
            progress(0)
            time.sleep(LOCK_POLL_S)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def open_cache(cache: Path) -> None:
    """Make a cache, and remove what killed processes left in it; raise ResourcesExhausted where that fails."""
    with disk_errors():
        cache.mkdir(parents=True, exist_ok=True)
    for path in (*cache.rglob(f"{PART}*"), *cache.glob(f"{SCRATCH}*")):
        with suppress(OSError):  # another process may do the same
            if path.stat().st_mtime < time.time() - PART_LIFE_S:
                discard(path, cache)


def _clear(path: Path, cache: Path) -> None:
    for place in reversed(path.parents):
        if place != cache and place.is_relative_to(cache) and not place.is_dir():
            discard(place, cache)
    if not path.is_file():
        discard(path, cache)
