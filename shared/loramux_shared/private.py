"""Folders and files that no other user can write: executed code is read from no others."""

from __future__ import annotations

import os
import stat
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def private_folder(folder: Path) -> str | None:
    """Make a folder that is ours alone; return why what is there is none, for a person to read.

    One of ours that was open to others is closed; files that lie in it already are looked at one by one.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & OTHERS_WRITE:
            folder.chmod(0o700)
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    return open_folder(folder)


def open_folder(folder: Path) -> str | None:
    """Return why a folder is not safe from others, for a person to read; None for one that is not there."""
    try:
        found = folder.lstat()
    except OSError:
        return None
    return _open_to_others(found) if stat.S_ISDIR(found.st_mode) else "is a link or no folder"


def read_private(path: Path) -> bytes | None:
    """Return the content of a file; None if it is missing, or another user could have written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or _open_to_others(found):
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _open_to_others(found: os.stat_result) -> str | None:
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid}"
    return "is open to others for writing" if found.st_mode & OTHERS_WRITE else None
