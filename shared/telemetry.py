"""Logs of the services: to stderr, for eyes on a terminal, as JSON lines elsewhere."""

from __future__ import annotations

import sys

import structlog


def log_to_stderr() -> None:
    """Configure structlog; called once, in ``__main__``."""
    lines = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            lines,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
