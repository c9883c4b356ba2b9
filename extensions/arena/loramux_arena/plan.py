"""The plan of an arena: questions, versions and their order."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loramux_arena.questions import Question
from loramux_arena.records import key_of


@dataclass(frozen=True)
class Plan:
    """The questions and the versions that answer them."""

    models: tuple[str, ...]
    """The versions, as requests name them."""
    baseline: str
    """The one that the others are compared with."""
    samples: int = 1
    """Answers of a version to a question."""
    max_tokens: int = 256
    """Most tokens of an answer; 0: nothing is generated, and only likelihoods are computed."""
    temperature: float = 0.0
    seed: int = 0
    """Seed of the first sample; the others have the numbers behind it. Of the statistics, too."""
    concurrency: int = 32
    """Requests that are open at once, at most."""
    scores: tuple[str, ...] = ()
    """Names of scores by reference, see `loramux_arena.scores`."""
    likelihood: bool = False


@dataclass(frozen=True)
class Entrant:
    """A version, as the server knows it."""

    model: str
    """Name that was requested."""
    name: str
    """Name that answered; of an alias the model that it stands for."""
    digest: str

    @property
    def identity(self) -> str:
        """Return the key of its answers: equal digests, equal adapters; of the base its name."""
        return self.digest or self.name


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted."""

    model: str
    question: Question
    sample: int


Order: TypeAlias = Callable[[Plan, Sequence[Question], int], Iterator[Ask]]
"""An order of requests: from a plan, questions and the number of samples of each."""


def in_turns(plan: Plan, questions: Sequence[Question], samples: int) -> Iterator[Ask]:
    """Return what is asked, in turns: as many questions as are open at once, of one version after the other.

    A step reads each adapter that it has rows of, and prefixes are shared within one version: so the requests
    that are open together are of as few versions as fill the batch. Turns, and not all questions of one version
    before the next, so that what is broken off can be compared as far as it came. Decision 66 has what was
    measured.
    """
    most = max(1, plan.concurrency // samples)
    for begin in range(0, len(questions), most):
        for model in plan.models:
            for question in questions[begin : begin + most]:
                for sample in range(samples):
                    yield Ask(model, question, sample)


def repeats(questions: Sequence[Question]) -> dict[str, int]:
    """Return of each question how many before it have the same prompt: their answers are not its own.

    Ids do not tell them apart: a line's number is another one when a line is put before it.
    """
    seen: Counter[str] = Counter()
    found = {}
    for question in questions:
        prompt = key_of(question.prompt)
        found[question.id] = seen[prompt]
        seen[prompt] += 1
    return found
