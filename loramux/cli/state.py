"""Files that the command line keeps between runs."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType


def state_dir() -> Path:
    """Return the folder: ``$XDG_STATE_HOME/loramux``, else ``~/.local/state/loramux``; made where it can be."""
    state_home = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = (
            Path(state_home) if Path(state_home).is_absolute() else Path.home() / ".local/state"
        ) / "loramux"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that cannot be written, or none
        return Path(tempfile.gettempdir())
    return folder


def tell_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception in one line; for ``sys.excepthook``.

    What the system refused is said as it says it; of a mistake of ours the traceback is kept in a file.
    """
    if issubclass(kind, KeyboardInterrupt):
        return
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"error: SYSTEM: {error.strerror}{place}\n")
        return
    file = state_dir() / "traceback.txt"
    line = f"error: INTERNAL: {kind.__name__}: {' '.join(str(error).split())}"
    try:
        file.write_text("".join(traceback.format_exception(kind, error, trace)), encoding="utf-8")
        line += f". Please report it with {file}."
    except OSError:
        line += ". Please report it."
    sys.stderr.write(f"{line}\n")
