"""Of sampling, what the builder, the replicas and the client must agree on."""

from __future__ import annotations

from typing import Final

MAX_TEMPERATURE: Final = 100.0
"""Where every token of a usual model is about as likely as any other; 0 is greedy."""
