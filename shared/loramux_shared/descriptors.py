"""The numbers of files and connections that this process may hold open."""

from __future__ import annotations

import resource
from typing import Final

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
