"""The logs of child processes: the lines that matter while they run, the last ones when they fail."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from loramux.cli import shell

TAIL_LINES = 12
POLL_S = 0.2
# Levels as structlog and Python's logging write them; and our own last line of a service that cannot start.
_MATTERS = re.compile(
    r"\[\s*(warning|error|critical)\s*\]|^(error|warning|fatal)\b|\b(ERROR|WARNING|CRITICAL)\b"
)
_LEVELS = frozenset({"warning", "error", "critical"})
_REPORTED = frozenset({"build failed"})
"""Events that the command which waits for them tells itself, as its own failure."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


async def follow(log: Path, name: str) -> None:
    """Print the lines that matter as they come, until cancelled."""
    with log.open(encoding="utf-8", errors="replace") as file:
        rest = ""
        while True:
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                if matters := important(line):
                    shell.say(f"{name}: {matters}", "yellow")
            await asyncio.sleep(POLL_S)


def important(line: str) -> str:
    """Return a log line as one that a person reads, or "" for one that can stay in the log."""
    line = _ANSI.sub("", line).strip()
    if not line.startswith("{"):
        return line if _MATTERS.search(line) else ""
    try:
        fields = json.loads(line)
    except ValueError:
        return ""
    if str(fields.pop("level", "")).lower() not in _LEVELS:
        return ""
    event = fields.pop("event", "")
    if event in _REPORTED:
        return ""
    for noise in ("timestamp", "logger", "exception", "stack"):
        fields.pop(noise, None)
    return " ".join([str(event), *(f"{name}={value}" for name, value in fields.items())])


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log that may say why it ends; a record of what went well does not."""
    text = log.read_text(encoding="utf-8", errors="replace")
    important_lines = [line for line in text.splitlines() if not line.startswith("{") or important(line)]
    return [_ANSI.sub("", line) for line in important_lines[-lines:]]
