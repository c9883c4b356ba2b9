"""Trying again: how often, how long, and what is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random

from loramux_shared.faults import Fault, SourceUnavailable
from loramux_shared.sources.base import Progress, unwatched
from loramux_shared.wording import is_whole

log = structlog.get_logger()

_T = TypeVar("_T")
_TICK_S: Final = 0.1


class Busy(SourceUnavailable):
    """A source that says when to come back."""

    wait_s = 0.0

    @classmethod
    def until(cls, message: str, retry_after: str | None) -> SourceUnavailable:
        """Return the fault for an answer with this ``Retry-After``; dates are not read, only seconds."""
        fault = cls(message)
        fault.wait_s = float(retry_after) if retry_after and is_whole(retry_after) else 0.0
        return fault


@dataclass(frozen=True)
class RetryPolicy:
    """Attempts, pauses and deadlines. Only `SourceUnavailable` is tried again."""

    attempts: int = 5
    wait_s: float = 0.5
    """Before the second attempt; doubled before each further one."""
    max_wait_s: float = 30.0
    """Longest pause, also where the source wishes a longer one."""
    answer_s: float = 120.0
    """For all attempts together, pauses included, beside the time that min_bytes_s gives."""
    min_bytes_s: int = 256 << 10
    """Slowest average speed of a transfer; a slower one is given up."""

    def call(self, attempt: Callable[[TimeLeft], _T], progress: Progress = unwatched) -> _T:
        """Return what an attempt returns; all attempts share one deadline.

        An exception of `progress` ends a pause.
        """
        deadline = TimeLeft(self)
        retrying = Retrying(
            stop=lambda state: state.attempt_number >= self.attempts or deadline.left_s <= state.upcoming_sleep,
            wait=self._pause,
            retry=retry_if_exception_type(SourceUnavailable),
            before_sleep=_log_retry,
            sleep=partial(_sleep, progress),
            reraise=True,
        )
        try:
            return retrying(attempt, deadline)
        except Fault as fault:
            failure = fault.with_traceback(None)
        # Traceback and context hold the client's frames and connections, as long as this fault lives.
        failure.__context__ = None
        raise failure

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        requested = error.wait_s if isinstance(error, Busy) else 0.0
        growing = wait_exponential(self.wait_s, self.max_wait_s)(state)
        pause = growing + wait_random(0, self.wait_s)(state)
        return min(max(requested, pause), self.max_wait_s)


def _log_retry(state: RetryCallState) -> None:
    problem = state.outcome.exception() if state.outcome else None
    log.warning(
        "source does not answer, retrying", pause_s=round(state.upcoming_sleep, 1), problem=str(problem)
    )


def _sleep(progress: Progress, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        progress(0)
        time.sleep(min(left, _TICK_S))


class TimeLeft:
    """The time that is left: every byte that comes in adds to it."""

    def __init__(self, patience: RetryPolicy) -> None:
        self._patience = patience
        self._started = time.monotonic()
        self._received = 0

    @property
    def left_s(self) -> float:
        """Seconds until it is given up."""
        allowed_s = self._patience.answer_s + self._received / self._patience.min_bytes_s
        return allowed_s - (time.monotonic() - self._started)

    def watch(self, name: str, progress: Progress) -> Progress:
        """Return a progress that also raises `SourceUnavailable` when no time is left."""

        def watched(count: int) -> None:
            progress(count)
            self._received += count
            if self.left_s < 0:
                raise SourceUnavailable(
                    f"{name}: the transfer is below the speed limit. Try again, or use a nearer copy."
                )

        watched(0)
        return watched
