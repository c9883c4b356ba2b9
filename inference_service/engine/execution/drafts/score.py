"""The score of drafts: what streams gain by them, and lose by the time that they take."""

from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass
from math import expm1, log, log1p
from typing import NamedTuple

from inference_service.core.sequence import Sequence


class Candidate(NamedTuple):
    """A sequence that may have a draft of a draft model."""

    seq: Sequence
    chance: float
    """Probability of each token."""
    most: int
    """Tokens."""
    rows: int
    """Rows of the draft model before the first token."""


class Choice(NamedTuple):
    """The best drafts of candidates."""

    score: float
    candidates: int
    """How many of them have one, from the first one on."""
    tokens: int
    """Tokens of each, at most."""


def gain(chance: float, tokens: int) -> float:
    """Return the logarithm of how much faster a sequence is with a draft that takes no time."""
    return log(tokens + 1 if chance >= 1 else (1 - chance ** (tokens + 1)) / (1 - chance))


@dataclass(frozen=True)
class Score:
    """The score of a step's drafts, as `Lookup.choose` has it: a sum of logarithms over all streams."""

    costs: Seq[float]
    """Cost of so many rows to verify, from 1 on."""
    decodes: int
    step_s: float
    """Seconds of the step without drafts."""
    takes_s: Callable[[int], float]
    """Seconds of a step of the draft model, by its rows."""
    looked_up: Mapping[Sequence, tuple[int, float]]
    """Tokens that prompt lookup drafted, and what they gain, by sequence; a candidate's replace them."""

    def verifying_s(self, rows: int) -> float:
        """Return the seconds by which so many rows lengthen the step."""
        return self.step_s * expm1(self.costs[rows - 1] / self.decodes) if rows else 0.0

    def of(self, candidates: Seq[Candidate], tokens: int) -> float:
        """Return the score of a step in which candidates have drafts of up to so many tokens."""
        drafts = dict(self.looked_up)
        for seq, chance, most, _ in candidates:
            drafts[seq] = min(tokens, most), gain(chance, min(tokens, most))
        rows = sum(count for count, _ in drafts.values())
        if not rows:
            return 0.0
        if rows > len(self.costs):
            return float("-inf")
        drafting_s = 0.0
        if candidates:
            drafting_s = self.takes_s(sum(each.rows for each in candidates))
            drafting_s += (tokens - 1) * self.takes_s(len(candidates))
        longer_s = self.verifying_s(rows) + drafting_s
        return sum(gained for _, gained in drafts.values()) - self.decodes * log1p(longer_s / self.step_s)

    def best(self, candidates: Seq[Candidate], tokens: int) -> Choice:
        """Return what is best for all candidates, or the first half of them, or a quarter, and so on."""
        choices = (
            Choice(self.of(candidates[:count], length), count, length)
            for count in _halves(len(candidates))
            for length in range(1, tokens + 1)
        )
        return max(choices, default=Choice(float("-inf"), 0, 0))


def _halves(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2
