"""Limits of a model, or of the holder of a key, on a replica."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

MAX_WEIGHT: Final = 1000.0


def unset(value: object) -> bool:
    """True for what a record leaves out, so that its bytes are those from before the field was there."""
    return value is None or value in ({}, ())


class Limits(BaseModel):
    """Limits of a model or a key. A limit that is not given is no bound, and the weight is 1."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )

    weight: float | None = Field(default=None, gt=0, le=MAX_WEIGHT, allow_inf_nan=False, exclude_if=unset)
    """Weight among models that compete: twice the weight is twice the tokens."""
    max_running: int | None = Field(default=None, ge=1, lt=2**31, exclude_if=unset)
    """Answers that are computed at once; others wait."""
    max_waiting: int | None = Field(default=None, ge=1, lt=2**31, exclude_if=unset)
    """Requests that wait for their first step; one more is refused as RATE_LIMITED."""
    tokens_per_minute: int | None = Field(default=None, ge=1, lt=2**53, exclude_if=unset)
    """Tokens of prompts and answers; after a minute's worth of them, requests are refused as RATE_LIMITED until
    the time for what was used has passed."""

    def over(self, other: Limits) -> Limits:
        """Return these limits, and the other's where these say nothing."""
        return other.model_copy(update=self.model_dump())


MAX_TEMPERATURE: Final = 100.0
"""Temperature at which every token of a usual model is about as likely as any other; 0 is greedy."""
