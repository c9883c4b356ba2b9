"""A model that says which of two answers is better, asked in both orders.

Source of the method, of its biases and of their cure by both orders: Zheng et al., Judging LLM-as-a-Judge with
MT-Bench and Chatbot Arena (NeurIPS 2023), 3.3 and 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Protocol

from loramux.client import AsyncClient
from loramux.records import GenerateOptions, Message
from loramux_arena.questions import Question
from loramux_arena.records import Answer, Verdict, key_of
from loramux_shared.faults import Fault, Status

LETTERS: Final = ("A", "B", "C")
TOKENS: Final = 4
"""Most tokens of a verdict; the letter is one of them."""
BEGIN: Final = "<<<{name}"
END: Final = "{name}>>>"


class NoVerdict(Fault, status=Status.INTERNAL):
    """A judge that said something else than a letter."""


class Judge(Protocol):
    """A judge that compares two answers."""

    name: str
    """For the report, and for what a verdict is known by."""
    digest: str

    async def letter(self, messages: Sequence[Message]) -> str:
        """Return one of `LETTERS`.

        Raises:
            Fault: it did not answer; `NoVerdict` where it said something else.
        """
        ...


@dataclass(frozen=True)
class Trial:
    """Two answers to a question, in one order."""

    question: Question
    baseline: Answer
    answer: Answer
    swapped: bool
    """True if the version's answer stands first; else the baseline's does."""

    @property
    def is_tie(self) -> bool:
        """Return True if no judge is needed: both texts are equal."""
        return self.answer.text == self.baseline.text


class ServedJudge:
    """A model of the server itself; a constraint leaves it nothing to say but a letter."""

    def __init__(self, client: AsyncClient, name: str, digest: str) -> None:
        self._client = client
        self.name, self.digest = name, digest

    async def letter(self, messages: Sequence[Message]) -> str:
        """Ask it, greedily."""
        options: GenerateOptions = {"max_tokens": TOKENS, "temperature": 0.0, "regex": "|".join(LETTERS)}
        return letter_in((await self._client.complete(self.name, messages, **options)).text)


def trials(question: Question, baseline: Answer, answer: Answer) -> list[Trial]:
    """Return both orders."""
    return [Trial(question, baseline, answer, swapped) for swapped in (False, True)]


def sample_trial() -> Trial:
    """Return one that every judge can judge."""
    yes, no = (Answer("", "", "", "", 0, text, False, 0, 0, 0, None, None, 0.0) for text in ("Yes.", "No."))
    return Trial(Question("", "Is 1 + 1 equal to 2?"), yes, no, swapped=False)


async def decide(judge: Judge, trial: Trial) -> Verdict:
    """Ask a judge.

    Raises:
        Fault: there is no verdict.
    """
    return verdict(judge, trial, await judge.letter(conversation(trial)))


def verdict(judge: Judge, trial: Trial, reply: str) -> Verdict:
    """Return what was said as a row."""
    answer = trial.answer
    return Verdict(
        key_of("verdict", judge.name, judge.digest, conversation(trial)),
        judge.name,
        answer.model,
        trial.question.id,
        answer.sample,
        trial.swapped,
        reply,
    )


def conversation(trial: Trial) -> list[Message]:
    """Return what a judge is asked.

    Answers cannot end their part: what looks like a marker in them is taken apart.
    """
    first, second = trial.baseline.text, trial.answer.text
    if trial.swapped:
        first, second = second, first
    parts = [("QUESTION", trial.question.as_text)]
    if trial.question.reference is not None:
        parts.append(("REFERENCE ANSWER", trial.question.reference))
    if trial.question.rubric:
        parts.append(("CRITERIA", trial.question.rubric))
    parts += [("ANSWER A", first), ("ANSWER B", second)]
    question = "\n\n".join(_part(name, text) for name, text in parts)
    return [
        {"role": "system", "content": rubric()},
        {"role": "user", "content": f"{question}\n\nWhich answer is better: A, B, or C for neither?"},
    ]


def _part(name: str, text: str) -> str:
    harmless = text.replace("<<<", "< < <").replace(">>>", "> > >")
    return f"{BEGIN.format(name=name)}\n{harmless}\n{END.format(name=name)}"


@cache
def rubric() -> str:
    """Return what a judge goes by."""
    return (Path(__file__).parent / "rubric.md").read_text(encoding="utf-8").strip()


def letter_in(reply: str) -> str:
    """Return the letter that a judge said.

    Raises:
        NoVerdict: something else.
    """
    letter = reply.strip().rstrip(".").upper()
    if letter not in LETTERS:
        raise NoVerdict(f"expected one of {', '.join(LETTERS)} from the judge, found {reply.strip()[:40]!r}")
    return letter
