"""The engine half of a replica as its API half sees it: what goes down, and what comes back.

`engine_driver.EngineDriver` is the engine in the same process; that of an API process asks over a channel
(`inference_service.api.processes.remote`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from inference_service.adapters.texts import Scorer
from inference_service.core.constraint import Constraint
from inference_service.core.request import Request, ResolvedModel
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import NEVER
from inference_service.core.served_model import AdapterDefaults, ServedModel
from inference_service.driver.delivery import Outputs
from loramux_shared.runtime import Pooling, ReasoningParser


@dataclass(frozen=True)
class Submission:
    """All that an engine needs of a request: one prompt, and the number of its answers."""

    model: ServedModel
    prompt: Sequence[int]
    """Tokens."""
    sampling: SamplingParams
    """Sampling of the first answer, from which those of the others follow."""
    n: int = 1
    constraint: Constraint | None = None
    ends: frozenset[int] = frozenset()
    """Tokens that may end a constrained text."""
    pooling: Pooling | None = None
    second: int = NEVER
    """Position of the first token of a pair's second text."""
    priority: int = 0
    deadline_s: float | None = None
    """On the clock of ``time.monotonic``."""
    cache_salt: str = ""


class DeployedTerms(Protocol):
    """The terms of the served generation for requests."""

    @property
    def served_model_name(self) -> str:
        """Return the name of the base."""

    @property
    def request_default_max_tokens(self) -> int | None:
        """Return the new tokens of a request that sets no limit; None: as many as fit."""

    @property
    def tool_parser(self) -> str:
        """Return the format of calls."""

    @property
    def reasoning_parser(self) -> ReasoningParser:
        """Return the format of reasoning."""

    @property
    def pooling(self) -> Pooling | None:
        """Return the pooling of requests for vectors that name none."""


class Admission(Protocol):
    """A request that was let in."""

    async def submit(self, submission: Submission) -> Outputs:
        """Put the answers of the request in the engine's queue; the caller must close what it gets.

        Raises:
            RequestInvalid: the constraint cannot be followed, and is not optional.
            RateLimited: the tokens of a minute are used up.
            QueueFull: too many sequences wait.
            Fault: the engine failed, was stopped, or its process is gone.
        """


class Driver(Protocol):
    """The engine half."""

    @property
    def max_queue(self) -> int:
        """Return the sequences that may wait."""

    @property
    def deployed(self) -> DeployedTerms:
        """Return what the served generation says about requests now."""

    async def choose(self, request: Request) -> ResolvedModel:
        """Return what answers a request; raise what `Naming.choose` does."""

    def admit(self, model: ServedModel) -> AbstractContextManager[Admission]:
        """Let a request of the caller in until the end of the block; raise RateLimited where it may not."""

    async def defaults(self, model: ServedModel) -> AdapterDefaults:
        """Return what an adapter brings beside its weights, or raise why it cannot be read."""

    async def scorer(self, model: ServedModel) -> Scorer:
        """Return the score head of a model that classifies, or raise what `AdapterTexts.scorer` does."""
