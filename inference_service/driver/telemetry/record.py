"""The course of one request, for those who watch."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Final, Protocol

from inference_service.core.request import AnswerDelta, AnswerFinished, Event, Request
from inference_service.core.sequence import EndReason
from inference_service.core.served_model import ServedModel
from inference_service.driver.delivery import AnswerView
from inference_service.driver.port import Submission
from loramux_shared.arrival import ARRIVED_S
from loramux_shared.faults import Fault, InternalFault

OK: Final = "OK"
CANCELLED: Final = "CANCELLED"
"""Outcome of a request, beside the reasons of faults."""


@dataclass
class AnswerRecord:
    """One of the n answers; times are on the clock of ``time.monotonic``."""

    view: AnswerView
    first_s: float | None = None
    """When its first token got here."""
    last_s: float | None = None
    """When its last token so far did."""
    tokens: int = 0
    finish: EndReason | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """Mean seconds between its tokens; None below two tokens."""
        seconds = _between(self.first_s, self.last_s)
        return None if seconds is None or self.tokens < 2 else seconds / (self.tokens - 1)


@dataclass
class RequestRecord:
    """The record of a request; times are on the clock of ``time.monotonic``."""

    request: Request
    model: ServedModel | None = None
    """None: there is no such model."""
    submission: Submission | None = None
    """None until the prompt is tokenized."""
    answers: list[AnswerRecord] = field(default_factory=list)
    """Empty until the engine was given them."""
    arrived_s: float = field(default_factory=lambda: ARRIVED_S.get() or time.monotonic())
    """Arrival of the call that brought it, as near to the socket as its server can tell."""
    submitted_s: float | None = None
    """When it was given to the engine."""
    first_s: float | None = None
    """When the first token of any answer got here."""
    ended_s: float | None = None
    outcome: str = ""
    """OK, CANCELLED or a fault's reason; empty until the end."""
    context: Context = field(default_factory=copy_context)
    """Context of the call that brought it: the server's span and its bindings for log lines."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 while they are not known."""
        return 0 if self.submission is None else len(self.submission.prompt)

    @property
    def temperature(self) -> float | None:
        """Return the temperature of its draws: the request's, the adapter's or the API's; None while it is
        unknown.
        """
        return (self.submission or self.request).sampling.temperature

    @property
    def cached_tokens(self) -> int:
        """Return the tokens of the prompt that the prefix cache held."""
        return self.answers[0].view.num_cached if self.answers else 0

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def began_s(self) -> float | None:
        """When the first step for it was submitted."""
        return self.answers[0].view.began_s if self.answers else None

    @property
    def queue_s(self) -> float | None:
        """Seconds between the engine's receipt and its first step for it."""
        return _between(self.submitted_s, self.began_s)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token; None of a vector, which has none."""
        return _between(self.arrived_s, None if self.request.output.pooling else self.first_s)

    @property
    def duration_s(self) -> float | None:
        """Seconds from arrival to end."""
        return _between(self.arrived_s, self.ended_s)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


class Watcher(Protocol):
    """Hears what happens to requests, on the event loop; must not wait and must not raise."""

    def began(self, record: RequestRecord) -> None:
        """Hear that the first token is there: how long it waited and what was cached is known."""
        ...

    def emitted(self, record: RequestRecord, delta: AnswerDelta) -> None:
        """Hear more of an answer."""
        ...

    def ended(self, record: RequestRecord) -> None:
        """Hear the end; comes once for every request, refused ones too."""
        ...


class RequestFollower:
    """Keep the record of one request, and notify the watchers."""

    def __init__(self, request: Request, watchers: Sequence[Watcher]) -> None:
        self.record = RequestRecord(request)
        self._watchers = watchers

    def prepared(self, submission: Submission) -> None:
        """Note what the engine will be given."""
        self.record.submission = submission

    def submitted(self, views: Iterable[AnswerView], submitted_s: float) -> None:
        """Note when the engine was given it, and its progress with the answers."""
        self.record.answers = [AnswerRecord(view) for view in views]
        self.record.submitted_s = submitted_s

    def see(self, event: Event) -> None:
        """Note an event that comes from the engine."""
        now, record = time.monotonic(), self.record
        if record.first_s is None:
            record.first_s = now
            for watcher in self._watchers:
                watcher.began(record)
        if isinstance(event, AnswerDelta):
            answer = record.answers[event.index]
            answer.first_s = answer.first_s or now
            answer.last_s = now
            answer.tokens += len(event.tokens)
            for watcher in self._watchers:
                watcher.emitted(record, event)
        elif isinstance(event, AnswerFinished):
            record.answers[event.index].finish = event.reason

    def end(self, outcome: str) -> None:
        """Note the end."""
        answers = self.record.answers
        whole = bool(answers) and all(answer.finish for answer in answers)
        self.record.ended_s = time.monotonic()
        self.record.outcome = OK if whole else outcome
        for watcher in self._watchers:
            watcher.ended(self.record)


@contextmanager
def following(request: Request, watchers: Sequence[Watcher]) -> Iterator[RequestFollower]:
    """Follow a request to the end of the block, however it ends."""
    follower, outcome = RequestFollower(request, watchers), InternalFault.reason
    try:
        yield follower
        outcome = OK
    except Fault as fault:
        outcome = fault.reason
        raise
    except (asyncio.CancelledError, GeneratorExit):
        outcome = CANCELLED
        raise
    finally:
        follower.end(outcome)
