"""The choice of an answer's tokens: the knobs of a request with their bounds, and those of a sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, Literal

from loramux_shared.runtime import MAX_TEMPERATURE

LogprobsMode = Literal["raw", "processed"]
"""raw: the model's own, before whatever a request does to its logits; processed: of what a token is drawn from,
after penalties, bias, masks, temperature, min-p, top-k and top-p, as vLLM calls them."""


MAX_LOGPROBS: Final = 20
MAX_BIAS: Final = 100.0


@dataclass(frozen=True)
class Number:
    """The bounds of a number, both ends included."""

    low: float
    high: float = math.inf
    words: str = ""

    def __str__(self) -> str:
        most = "or more" if self.high == math.inf else f"to {self.high:g}"
        return self.words or f"{self.low:g} {most}"


@dataclass(frozen=True)
class Texts:
    """The bounds of a list of texts: their number, and the characters of each."""

    most: int
    longest: int


@dataclass(frozen=True)
class Ids:
    """The bound of a list of tokens; None: the vocabulary."""

    most: int | None = None


Bound = Number | Texts | Ids


def _knob(bound: Bound | None = None, default: Any = None) -> Any:
    return field(default=default, metadata={"bound": bound})


@dataclass(frozen=True)
class Sampling:
    """The options of a request for the tokens of its answers, each with its default and its bounds.

    None is unset: the adapter's default comes next, then the deployment's, then the API's.
    """

    max_tokens: int | None = _knob(Number(0))
    """New tokens at most; 0 computes the prompt alone, together with prompt_logprobs or pooling."""
    min_tokens: int = _knob(Number(0), 0)
    """None of the stop tokens before so many others."""
    temperature: float | None = _knob(Number(0.0, MAX_TEMPERATURE))
    """0 is greedy."""
    usual_temperature: float = 0.0
    """The API's, where neither the request nor the adapter has one."""
    top_p: float | None = _knob(Number(math.ulp(0.0), 1.0, "above 0, at most 1"))
    top_k: int | None = _knob(Number(-1))
    """0 and -1 are all tokens."""
    min_p: float = _knob(Number(0.0, 1.0), 0.0)
    """Tokens less likely than this part of the most likely one are left out."""
    seed: int | None = _knob(Number(-(2**63), 2**64 - 1, "an integer of 64 bits"))
    """int64 in JSON and uint64 over gRPC; unset, a random one."""
    stop: tuple[str, ...] = _knob(Texts(16, 256), ())
    """Texts that end an answer."""
    stop_token_ids: tuple[int, ...] = _knob(Ids(64), ())
    include_stop_str_in_output: bool = False
    """The text ends with what ended it, a stop token too."""
    ignore_eos: bool = False
    repetition_penalty: float = _knob(Number(0.01, 10.0), 1.0)
    presence_penalty: float = _knob(Number(-2.0, 2.0), 0.0)
    frequency_penalty: float = _knob(Number(-2.0, 2.0), 0.0)
    logit_bias: Mapping[int, float] = field(default_factory=dict, metadata={"bound": Ids(1024)})
    """Added to the logits by token, -MAX_BIAS to MAX_BIAS each."""
    bad_words: tuple[str, ...] = _knob(Texts(1024, 256), ())
    """None of them is ever complete in the tokens of the answer, as the tokenizer spells it."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """The same, as tokens, with the bounds of bad_words."""
    allowed_token_ids: tuple[int, ...] | None = _knob(Ids())
    """No others, but for the end of a text that its constraint lets end."""
    logprobs: int | None = _knob(Number(0, MAX_LOGPROBS))
    """Log probability of each token of the answers, and of so many of the most likely ones beside it."""
    logprobs_mode: LogprobsMode | None = None
    """raw or processed, see `LogprobsMode`; None: as the server's settings have it."""
    prompt_logprobs: int | None = _knob(Number(0, MAX_LOGPROBS))
    """The same for the tokens of the prompt, always raw; 0 is their own alone."""


KNOBS: Final[Mapping[str, Bound | None]] = {each.name: each.metadata.get("bound") for each in fields(Sampling)}
"""The bounds of each field of `Sampling`; None where it has none, or rules of its own."""


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
    """Tokens that may not come next, by the number and the ids of the answer's last tokens."""
    logprobs: int | None = None
    """Number of the most likely tokens to report with their log probability; None reports nothing."""
    logprobs_mode: LogprobsMode = "raw"
    """Mode of the answer's tokens; those of the prompt are always raw."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; 0 reports them alone."""

    def of_answer(self, index: int) -> SamplingParams:
        """Return the sampling of one answer: only the first scores the prompt, the others have own seeds."""
        if not index:
            return self
        seed = int.from_bytes(blake2b(f"{self.seed}:{index}".encode(), digest_size=8).digest()) >> 1
        return replace(self, seed=seed, prompt_logprobs=None)

    @property
    def greedy(self) -> bool:
        """True when no random number is drawn."""
        return self.temperature == 0.0

    @cached_property
    def num_shaped(self) -> float:
        """Leading tokens of the answer that are not drawn from the model's logits as they are."""
        restricts = self.allowed_token_ids is not None or self.bad_words
        return math.inf if self.logit_bias or self.penalizes or restricts else self.min_tokens

    @cached_property
    def penalizes(self) -> bool:
        """True when what was said before changes what comes next."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
