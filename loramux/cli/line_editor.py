"""Lines that are typed: edited, completed, and remembered between runs. Without readline they are just read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from loramux.cli.state import state_dir

try:
    import readline
except ImportError:  # Windows, and builds of Python without it
    _readline: ModuleType | None = None
else:
    _readline = readline

HISTORY_LINES = 1000


@contextlib.contextmanager
def line_editor(candidates: Callable[[str], Sequence[str]]) -> Iterator[None]:
    """Give ``input()`` its keys and its history meanwhile; candidates returns what a line may become."""
    if _readline is None:
        yield
        return
    file = state_dir() / "chat_history"
    with contextlib.suppress(OSError):
        _readline.read_history_file(file)
    _readline.set_history_length(HISTORY_LINES)
    _readline.set_completer_delims("")
    _readline.set_completer(_completer(candidates))
    libedit = "libedit" in (_readline.__doc__ or "")
    _readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.touch(mode=0o600)  # what was said is nobody else's
            _readline.write_history_file(file)


def _completer(candidates: Callable[[str], Sequence[str]]) -> Callable[[str, int], str | None]:
    found: list[str] = []

    def complete(line: str, state: int) -> str | None:
        if state == 0:
            found[:] = candidates(line)
        return found[state] if state < len(found) else None

    return complete
