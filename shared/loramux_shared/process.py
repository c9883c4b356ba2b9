"""A process: its open files and private folders, its log, and messages to the one that started it."""

import fcntl
import os
import resource
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

import structlog

TARGET: Final = 16_384
"""The soft limit on open files is raised to this, or to the hard limit where that is lower."""
RESERVED: Final = 128
"""Descriptors kept free for files, the store, the base's source and helper processes.

An idle replica holds 16.
"""
MOST: Final = 4096
"""Upper bound of the connections of one server: several times what the queue of requests holds."""
LEAST: Final = 16

log = structlog.get_logger()


def raise_limit() -> None:
    """Raise the soft limit on open files where the hard one allows it, and say so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = TARGET if hard == resource.RLIM_INFINITY else min(hard, TARGET)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        log.info("limit on open files raised", before=soft, now=target)


def connections_per_server() -> int:
    """Return the connections that each of two servers may hold, so that the limit is never reached."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST
    return max(LEAST, min(MOST, (soft - RESERVED) // 2))


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a child that runs a module, and imports nothing of the working directory."""
    return (sys.executable, "-P", "-m", module, *arguments)


SOCKET: Final = "NOTIFY_SOCKET"
READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
STATUS: Final = "STATUS="
"""The prefix of a line for people."""


_HEARING: Final[list[Callable[[str], None]]] = []


@contextmanager
def hearing(tell: Callable[[str], None]) -> Iterator[None]:
    """Pass all that a start in this process reports within the block to a function, on any thread."""
    _HEARING.append(tell)
    try:
        yield
    finally:
        _HEARING.remove(tell)


def report(doing: str) -> None:
    """Say what a start does now, in a few words."""
    for tell in tuple(_HEARING):
        tell(doing)
    notify(f"{STATUS}{doing}")


def notify(message: str) -> None:
    """Send a message if the service manager asked for it; a failure is logged."""
    path = os.environ.get(SOCKET, "")
    if not path:
        return
    # A name that begins with @ stands for one in Linux' abstract namespace, which begins with a zero byte.
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), address)
    except OSError as error:
        log.warning("notification could not be sent", message=message, variable=SOCKET, why=error.strerror)


LogFormat = Literal["auto", "json", "text"]


def log_to_stderr(form: LogFormat = "auto") -> None:
    """Configure structlog; called in ``__main__``, once more when the settings are known.

    What is bound to the context of a call (structlog.contextvars) is in all its lines.
    """
    text = sys.stderr.isatty() if form == "auto" else form == "text"
    lines = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if text
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            lines,
        ],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )


OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which is free when its process ends, however it ends.

    Yields False where another process has it, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


YOUNG_S: Final = 60.0
"""Age below which a folder may be one whose maker has not locked it yet."""
SOCKETS: Final = "loramux-sockets-"
SHORT: Final = 64
"""Most characters of a path below which sockets are made, whose own paths have some hundred bytes at most."""


@contextmanager
def working_folder(prefix: str, place: str | Path | None = None) -> Iterator[Path]:
    """Make a private folder that goes at the end, and remove those that killed processes left beside it."""
    for left in Path(place or tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            if left.lstat().st_mtime < time.time() - YOUNG_S:
                with locked(left) as abandoned:
                    if abandoned:
                        shutil.rmtree(left)
    made = tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
    with made as folder, locked(Path(folder)):
        yield Path(folder)


def socket_folder() -> AbstractContextManager[Path]:
    """Make a working folder for sockets."""
    return working_folder(SOCKETS, None if len(tempfile.gettempdir()) <= SHORT else "/tmp")  # noqa: S108


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
