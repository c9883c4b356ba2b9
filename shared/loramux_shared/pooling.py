"""How the hidden states of a text become one vector."""

from __future__ import annotations

from enum import StrEnum


class Pooling(StrEnum):
    """What is taken of the hidden states behind the last norm, one for each token."""

    LAST = "last"
    """That of the last token."""
    MEAN = "mean"
    """Their mean."""
