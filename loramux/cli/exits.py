"""The exit codes of the ``loramux`` command."""

import os
import sys
import tempfile
import traceback
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from loramux_shared.faults import Fault


class Exit(IntEnum):
    """The exit status of a command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3
    DENIED = 4
    BROKEN = 5
    INTERRUPTED = 130
    PIPE_CLOSED = 141


MEANINGS: Final = {
    Exit.OK: "success",
    Exit.FAILED: "refused or failed: a retry will not help",
    Exit.USAGE: "a wrong flag, argument or setting",
    Exit.UNAVAILABLE: "a service does not answer, is busy or restarts: a retry may succeed",
    Exit.DENIED: "missing API key, scope, secret or licence",
    Exit.BROKEN: "of `serve`: the device or the engine failed; start it again",
    Exit.INTERRUPTED: "Ctrl-C",
    Exit.PIPE_CLOSED: "its output was closed, as `head -1` does",
}


def exit_of(fault: "Fault") -> Exit:
    """Return the exit code of a command that ends with a fault."""
    from loramux_shared.faults import DeadlineExceeded, SettingsInvalid, Status

    if isinstance(fault, SettingsInvalid):
        return Exit.USAGE
    if isinstance(fault, DeadlineExceeded) or fault.retry_after_s is not None:
        return Exit.UNAVAILABLE
    return Exit.DENIED if fault.status in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED) else Exit.FAILED


def state_dir() -> Path:
    """Return the folder: ``$XDG_STATE_HOME/loramux``, ``~/.local/state/loramux`` or a new private one."""
    state_home = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = (
            Path(state_home) if Path(state_home).is_absolute() else Path.home() / ".local/state"
        ) / "loramux"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that cannot be written, or none
        return Path(tempfile.mkdtemp(prefix="loramux-"))
    return folder


def tell_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception in one line; for ``sys.excepthook``.

    What the system refused is line as it says it; of a mistake of ours the traceback is kept in a file.
    """
    if issubclass(kind, KeyboardInterrupt):
        return
    cause = error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and cause.strerror:
        place = f": {cause.filename}" if cause.filename else ""
        sys.stderr.write(f"error: SYSTEM: {cause.strerror}{place}\n")
        return
    file = state_dir() / "traceback.txt"
    line = f"error: INTERNAL: {type(cause).__name__}: {' '.join(str(cause).split())}"
    try:
        file.write_text("".join(traceback.format_exception(kind, error, trace)), encoding="utf-8")
        line += f". Please report it with {file}."
    except OSError:
        line += ". Please report it."
    sys.stderr.write(f"{line}\n")


def tell_unraisable(failed: "UnraisableHookArgs") -> None:
    """Print what a finalizer raised, unless Ctrl-C is the cause; for ``sys.unraisablehook``.

    An object whose making Ctrl-C ended lacks attributes that its ``__del__`` reads: gRPC's calls do.
    """
    unfinished = getattr(failed.object, "__name__", "") == "__del__" and failed.exc_type is AttributeError
    if not unfinished and failed.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(failed)
