"""The rules of sampling on which the builder, the replicas and the client must agree."""

from __future__ import annotations

from typing import Final

MAX_TEMPERATURE: Final = 100.0
"""Temperature at which every token of a usual model is about as likely as any other; 0 is greedy."""
