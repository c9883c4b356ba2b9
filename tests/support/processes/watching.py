"""Waits for a line of a process, and its end."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.support.processes.forks import Forked
from tests.support.waiting import wait_until

Process = TypeVar("Process", Forked, "subprocess.Popen[bytes]")


@contextmanager
def kill_at_end(process: Process) -> Iterator[Process]:
    """Kill a process when the block ends, if it still runs."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def await_line(process: Forked | subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """Return the first line of a log that matches, or fail once the process has ended without."""

    def found() -> re.Match[str] | bool | None:
        return re.search(f"^.*{pattern}.*$", log.read_text(), re.M) or process.poll() is not None

    match = wait_until(found, f"{pattern!r} in a log", log.read_text)
    assert isinstance(match, re.Match), log.read_text()
    return match[0]
