"""A request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from inference_service.core.sampling import SamplingParams


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token, or a stop text found outside the engine."""
    LENGTH = "length"
    """Its own limit, or the longest sequence that is served."""
    DEADLINE = "deadline"
    """Its deadline passed."""
    FAILED = "failed"
    """The step that it was part of failed."""


@dataclass(frozen=True)
class Adapter:
    """What the scheduler knows about a loaded adapter."""

    name: str
    uid: int
    """New at every load; part of every prefix-cache key, so that old keys and values are never met again."""
    slot: int
    """Its place in the LoRA backend."""


@dataclass(eq=False)
class Sequence:
    """Prompt and answer of one request; owned by the engine's thread once it was added."""

    id: str
    tokens: list[int]
    """The prompt, then the answer as it grows."""
    sampling: SamplingParams
    adapter: Adapter | None = None
    """None is the base."""
    priority: int = 0
    """Higher first."""
    arrival: int = 0
    """The order of arrival breaks ties."""
    deadline_s: float | None = None
    """On the clock of ``time.monotonic``."""

    num_prompt: int = field(init=False)
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache."""
    num_cached: int = 0
    """Of the prompt, tokens that the prefix cache held at first admission."""
    blocks: list[int] = field(default_factory=list)
    """Cache blocks, in the order of the tokens."""
    passed_by: int = 0
    """Sequences with adapters that were admitted ahead while its own adapter found no place."""
    num_hashed: int = 0
    """Leading blocks that are registered in the prefix cache."""
    last_hash: int = 0
    """Prefix hash of the last registered block."""

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that have no keys and values yet."""
        return len(self.tokens) - self.num_computed

    @property
    def adapter_uid(self) -> int:
        """The adapter's uid; 0 for the base."""
        return self.adapter.uid if self.adapter else 0

    @property
    def slot(self) -> int:
        """The adapter's slot; -1 for the base."""
        return self.adapter.slot if self.adapter else -1

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of admission: priority, then arrival."""
        return (-self.priority, self.arrival)


@dataclass(frozen=True)
class Token:
    """One new token of a sequence."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log probabilities, best first."""


@dataclass(frozen=True)
class StepOutput:
    """What one step did for one sequence; the last output of a sequence has a finish reason."""

    seq_id: str
    token: Token | None
    finish: FinishReason | None = None
    num_cached: int = 0
    first: bool = False
    """True for the first token of an answer."""
