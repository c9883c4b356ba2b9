"""Limits of builds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildLimits:
    """What the operator allows."""

    running: int = 2
    """Builds at once; others wait."""
    waiting: int = 1000
    """Builds that wait; one more is answered QUEUE_FULL."""
    timeout_s: float = 6 * 3600
    """Of one build, from when it runs."""
    beat_s: float = 15
    """Between two signs of life of the running builds."""
    lease_s: float = 90
    """Without a sign of life, after which another builder takes a build over."""
