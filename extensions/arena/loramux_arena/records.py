"""The results of an arena's requests: answers, likelihoods, verdicts, failures."""

import hashlib
import json
from dataclasses import dataclass
from typing import TypeAlias


def key_of(*parts: object) -> str:
    """Return what a request is known by: equal parts, equal key."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """One answer of one version to one question."""

    key: str
    """Key of the version, the prompt and the options."""
    model: str
    """Name that was requested."""
    digest: str
    """Digest of the version that answered: sha256 of its manifest, in hex; empty for the base."""
    question: str
    """The question's id."""
    sample: int
    """0, 1, ... of the answers of this version to this question."""
    text: str
    cut: bool
    """True if it ended at its limit of tokens."""
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were not computed again."""
    first_s: float | None
    """Seconds to the first token; None where there was none."""
    per_token_s: float | None
    """Seconds per token after those that came first; None where there were none."""
    seconds: float
    """To its end."""

    @property
    def computed(self) -> int:
        """Tokens that were computed for it."""
        return self.prompt_tokens - self.cached_tokens + self.tokens


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a question's reference for a version."""

    key: str
    model: str
    digest: str
    question: str
    logprob: float
    """Natural logarithm, of all tokens of the reference together."""
    tokens: int

    @property
    def per_token(self) -> float:
        """Return the mean over the reference's tokens, so that long references do not weigh more than short
        ones.
        """
        return self.logprob / self.tokens


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict about two answers in one order."""

    key: str
    judge: str
    model: str
    """The version that is compared with the baseline."""
    question: str
    sample: int
    swapped: bool
    """True if the version's answer stood first; else the baseline's did."""
    letter: str
    """A: the first one is better. B: the second one. C: neither."""

    @property
    def score(self) -> float:
        """1 where the version won, 0 where the baseline did, 0.5 where neither."""
        if self.letter not in ("A", "B"):
            return 0.5
        return float((self.letter == "A") == self.swapped)


Row: TypeAlias = Answer | Likelihood | Verdict


@dataclass(frozen=True)
class Failure:
    """A request that has no answer."""

    what: str
    """answer, likelihood or verdict."""
    model: str
    question: str
    sample: int
    reason: str
    message: str
