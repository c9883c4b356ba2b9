"""Limits of builds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildLimits:
    """The operator's limits of builds."""

    running: int = 2
    """Builds at once; others wait."""
    waiting: int = 1000
    """Builds that wait; one more is answered QUEUE_FULL."""
    timeout_s: float = 6 * 3600
    """Seconds that one build may run."""
    beat_s: float = 15
    """Between two signs of life of the running builds."""
    lease_s: float = 90
    """Seconds without a sign of life after which another builder takes a build over."""
