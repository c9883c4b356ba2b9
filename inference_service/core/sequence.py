"""A request inside the engine, and what one step computes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from inference_service.core.adapter import Adapter, Mixture, ScaledSlots
from inference_service.core.constraint import Grammar
from inference_service.core.sampling import SamplingParams
from loramux_shared.faults import Fault
from loramux_shared.pooling import Pooling

GONE: Final = -1
"""In a table of cache blocks: no later row sees this one, and it is another's by now."""
NOWHERE: Final = -1
"""The slot of a state that nobody has."""
NEVER: Final = 2**62
"""A position that no sequence comes to."""
Vector: TypeAlias = npt.NDArray[np.float32]
"""[hidden size]: what the hidden states of a sequence became."""


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
class Share:
    """What a flow of sequences may have of an engine, beside others."""

    weight: float = 1.0
    """With twice the weight a flow is served twice the tokens, while others wait."""
    max_running: int | None = None
    """Sequences under way at once; None: as many as there are seats."""


FAIR: Final = Share()


@dataclass(eq=False)
class Sequence:
    """Prompt and answer of one request; owned by the engine's thread once it was added."""

    id: str
    tokens: list[int]
    """The prompt, then the answer as it grows."""
    sampling: SamplingParams
    adapter: Adapter | Mixture | None = None
    """None is the base."""
    priority: int = 0
    """Higher first."""
    arrival: int = 0
    """The order of arrival breaks ties."""
    deadline_s: float | None = None
    """On the clock of ``time.monotonic``."""
    grammar: Grammar | None = None
    """What the answer must look like; it has accepted the tokens of the answer that are known here."""
    invocation: int = 0
    """Position of the first token that the adapter acts on: those before are the base's."""
    pooling: Pooling | None = None
    """How its hidden states become a vector, which is its answer; no tokens are drawn, and `max_tokens` is 0.
    None: tokens are."""

    cache_salt: str = ""
    """Part of every prefix-cache key, as the adapter is."""
    model: str = ""
    """The name that it is answered under, the base's included."""
    counted: tuple[str, ...] = ()
    """The names that it is counted under, where those are others: of a mixture, those of its adapters."""
    flow: str = ""
    """Whose tokens are counted together: flows are served in turns, and within one by priority and arrival."""
    share: Share = FAIR
    """Of its flow."""

    num_prompt: int = field(init=False)
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache."""
    num_cached: int = 0
    """Of the prompt, tokens that the prefix cache held at first admission."""
    began_s: float | None = None
    """When the first step that computes it was submitted, on the clock of ``time.monotonic``."""
    blocks: array[int] = field(default_factory=lambda: array("i"))
    """Cache blocks, in the order of the tokens; int32, so that a step copies them as they are. Of layers that
    see equally far: those of the first group of them."""
    tables: tuple[array[int], ...] = ()
    """The blocks of every group of layers, the first included; GONE where no later row sees one."""
    room: int = 0
    """Leading tokens for which every group has blocks."""
    state_slot: int = NOWHERE
    """Where its state is, in bases whose layers carry one from token to token."""
    stop: int = NEVER
    """A position where a chunk of it must end, for its state to be kept."""
    stops: list[int] = field(default_factory=list)
    """Those beside the regular ones, which its beginning chose."""
    num_charged: int = 0
    """Leading tokens that its flow was charged for; those that are computed again are not charged again."""
    lane: Any = None
    """Where the scheduler keeps it, with others of its flow and adapters."""
    expected: Any = None
    """What prompt lookup knows of it."""
    num_full: int = 0
    """Leading blocks that are full and whose tokens are known: those that the prefix cache has heard of."""
    hashes: list[int] = field(default_factory=list)
    """Prefix hashes of leading full blocks, as far as they were asked for; they outlast the blocks."""
    drawing: bytes = b""
    """How its tokens are drawn, as the sampler on the device reads it; made at the first draw."""
    prompt_scores: list[Token] = field(default_factory=list)
    """Leading tokens of the prompt with log probabilities, where those are asked for; the first has none."""
    pooled: Any = None
    """The sum of hidden states so far, where their mean is asked for; on the device."""
    num_pooled: int = 0
    """Leading tokens whose hidden states are in it; those that are computed again are not added again."""
    in_flight: int = 0
    """Tokens behind `tokens` that were drawn on the device and are not known here yet, or 1 for a vector."""

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        if self.sampling.prompt_logprobs is not None:
            self.prompt_scores.append(Token(self.tokens[0]))

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, those in flight included."""
        return len(self.tokens) + self.in_flight - self.num_prompt

    @property
    def num_known(self) -> int:
        """Tokens of the answer that are known here."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that have no keys and values yet, those in flight included."""
        return len(self.tokens) + self.in_flight - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """True while log probabilities of its prompt are asked for and not all known."""
        return self.sampling.prompt_logprobs is not None and len(self.prompt_scores) < self.num_prompt

    @property
    def needs_every_row(self) -> bool:
        """True while its prompt must be computed row by row, whatever the prefix cache holds."""
        return self.scores_prompt or self.pooling is Pooling.MEAN

    @property
    def bound(self) -> int:
        """The position that its next chunk must not go beyond: a stop, or where its adapter begins to act."""
        return min(self.stop, self.invocation) if self.num_computed < self.invocation else self.stop

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All that must be resident for it; none for the base."""
        return () if self.adapter is None else self.adapter.members

    @property
    def slot(self) -> int | ScaledSlots:
        """The slot of the adapter that acts on its next chunk, or those of a mixture; -1 for the base.

        Raises:
            RuntimeError: the adapter is not resident, so that no step may have this sequence.
        """
        if self.adapter is None or self.num_computed < self.invocation:
            return -1
        slot = self.adapter.slot
        if slot is None:
            raise RuntimeError(f"adapter {self.adapter.digest[:12]} is in a step, and not in the bank")
        return slot

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of admission: priority, then arrival."""
        return (-self.priority, self.arrival)


@dataclass(frozen=True)
class Token:
    """A token, and what the model thought of it.

    Log probabilities are the model's own: those of its logits before bias, penalties, masks and temperature.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log probabilities, best first."""
    rank: int | None = None
    """1 + how many tokens are more likely: those that tie share a rank. None without a log probability."""
    impossible: bool = False
    """True when there was none to draw: everything that the request asks for together allows no token."""
    finite: bool = True
    """False when the model's largest logit is NaN or infinite, so that the token means nothing."""


class StepOutput(NamedTuple):
    """What one step did for one sequence; the last output of a sequence has a finish reason."""

    seq_id: str
    token: Token | None
    finish: FinishReason | None = None
    num_cached: int = 0
    first: bool = False
    """True for the first token of an answer."""
    prompt: tuple[Token, ...] = ()
    """With the first output, the tokens of the prompt, where their log probabilities are asked for."""
    fault: Fault | None = None
    """Why it failed, where that is known: its adapter cannot be loaded, or its values are no numbers."""
    pooled: Vector | None = None
    """What its hidden states became, where that is asked for."""


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, from ``num_computed`` on."""

    seq: Sequence
    length: int
    drafted: int = 0
    """Of its tokens, those at the end that are expected and not known; each is verified by a draw behind it."""

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.seq.num_computed

    @property
    def end(self) -> int:
        """Position behind the last token: the length of the context that the chunk attends to."""
        return self.seq.num_computed + self.length

    @property
    def samples(self) -> bool:
        """True when the chunk reaches the sequence's end, so that a token is drawn from the row there."""
        return self.length - self.drafted == self.seq.num_pending


@dataclass(frozen=True)
class Batch:
    """The chunks of one step."""

    chunks: tuple[Chunk, ...]
    drafts: Mapping[Sequence, list[int]] = field(default_factory=dict)
    """The tokens that are expected behind those that are known, of the chunks that have some."""
    copies: tuple[Mapping[int, int], ...] = ()
    """What is copied among the slots of states before the step: those that are written, with those that are
    read. All of a mapping are read before any is written, and mappings follow one another."""

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return sum(chunk.length for chunk in self.chunks)
