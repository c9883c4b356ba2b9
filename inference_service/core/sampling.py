"""How the next token of a sequence is chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; the defaults are greedy decoding without a limit."""

    max_tokens: int = 1 << 30
    """New tokens at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is all tokens."""
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """The sequence ends with the first of them; the end-of-sequence tokens are among them unless ignored."""
    logprobs: int | None = None
    """How many of the most likely tokens are reported with their log probability; None reports nothing."""

    @property
    def greedy(self) -> bool:
        """True when no random number is drawn."""
        return self.temperature == 0.0
