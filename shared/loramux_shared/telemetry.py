"""Logs of the services, on stderr: for eyes on a terminal, as JSON lines elsewhere, by default."""

from __future__ import annotations

import sys
from typing import Literal

import structlog

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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
