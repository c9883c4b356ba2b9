"""How the next token of a sequence is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

LogprobsMode = Literal["raw", "processed"]
"""raw: the model's own, before whatever a request does to its logits; processed: of what a token is drawn from,
after penalties, bias, masks, temperature, min-p, top-k and top-p, as vLLM calls them."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one sequence; the defaults are greedy decoding without a limit."""

    max_tokens: int = 1 << 30
    """New tokens at most; 0 computes the prompt alone."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is all tokens."""
    min_p: float = 0.0
    """Tokens less likely than this part of the most likely one are left out."""
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """The sequence ends with the first of them; the end-of-sequence tokens are among them unless ignored."""
    min_tokens: int = 0
    """None of the stop tokens before so many others."""
    repetition_penalty: float = 1.0
    """Logits of tokens of prompt and answer are divided by it where positive, else multiplied."""
    presence_penalty: float = 0.0
    """Taken from the logits of the tokens of the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as it occurs in the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, by token."""
    allowed_token_ids: bytes | None = None
    """The tokens that may be drawn, as `Grammar.mask` says them; None is all."""
    bad_words: Mapping[int, Mapping[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """By how many, and which, the last tokens of the answer are: those that may not come next."""
    logprobs: int | None = None
    """How many of the most likely tokens are reported with their log probability; None reports nothing."""
    logprobs_mode: LogprobsMode = "raw"
    """Of the tokens of the answer; those of the prompt are always raw."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; 0 reports them alone."""

    @property
    def greedy(self) -> bool:
        """True when no random number is drawn."""
        return self.temperature == 0.0

    @cached_property
    def restricts(self) -> bool:
        """True when some tokens may not come."""
        return self.allowed_token_ids is not None or bool(self.bad_words)

    @cached_property
    def penalizes(self) -> bool:
        """True when what was said before changes what comes next."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
