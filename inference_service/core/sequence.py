"""A request inside the engine, what one step computes of it, and what comes out."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from inference_service.core.adapter import Adapter, Mixture, ScaledSlots
from inference_service.core.constraint import Grammar
from inference_service.core.sampling import SamplingParams
from loramux_shared.faults import Fault
from loramux_shared.runtime import Pooling

GONE: Final = -1
"""Entry of a block table whose block was given back: no later row reads it."""
NOWHERE: Final = -1
"""State slot of a sequence that has none."""
NEVER: Final = 2**62
"""A position that no sequence reaches."""
Vector: TypeAlias = npt.NDArray[np.float32]
"""[hidden size]: the pooled hidden states of a sequence; [tokens * hidden size] where they are all of them."""


class EndReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token, or a stop text found outside the engine."""
    LENGTH = "length"
    """Its own limit, or the longest sequence that is served."""
    DEADLINE = "deadline"
    """Its deadline passed."""
    FAILED = "failed"
    """A step raised for it."""


@dataclass(slots=True)
class Token:
    """A token, and what the model thought of it.

    Log probabilities are the model's own: those of its logits before bias, penalties, masks and temperature.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log probabilities, best first."""
    rank: int | None = None
    """1 + the number of tokens that are more likely, so ties share a rank. None without a log probability."""
    impossible: bool = False
    """True when no token could be drawn: everything that the request asks for together allows none."""
    finite: bool = True
    """False when the model's largest logit is NaN or infinite, so that the token means nothing."""


@dataclass(frozen=True)
class Share:
    """The share of an engine that the sequences of one queue may have, beside those of others."""

    weight: float = 1.0
    """Weight: twice the weight is served twice the tokens, while others wait."""
    max_running: int | None = None
    """Sequences that may run at once; None: as many as there are seats."""
    background: bool = False
    """True if they have what other sequences leave, and give up for those whatever they have."""


FAIR: Final = Share()


@dataclass(eq=False, slots=True)
class Progress:
    """The engine's progress with a sequence. Only the engine's thread writes it.

    The comment above each group of fields names the part of the engine that writes them.
    """

    # engine.Engine
    tokens: list[int]
    """The prompt, then the known tokens of the answer."""
    arrival: int = 0
    """Order of arrival; the earlier of two sequences of one priority comes first."""
    began_s: float | None = None
    """When the first step that computes the sequence was submitted, on the clock of ``time.monotonic``."""

    # scheduler.Scheduler
    end: int = NEVER
    """Tokens of prompt and answer at which it ends by its limit, or by that of the engine."""
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache; from a prefix, the block manager sets it."""
    in_flight: int = 0
    """Tokens behind `tokens` that were drawn on the device and are not known here yet, or 1 for a vector."""
    num_cached: int = 0
    """Tokens of the prompt that the prefix cache held at the first admission."""
    num_charged: int = 0
    """Leading tokens that were charged to the sequence's flow, or found in the prefix cache; recomputed tokens
    are not charged again."""

    # block_manager.BlockManager and blocks.StateSlots
    blocks: array[int] = field(default_factory=lambda: array("i"))
    """Cache blocks of the first group of layers that see equally far, in the order of the tokens; int32, so
    that a step copies them as they are."""
    tables: tuple[array[int], ...] = ()
    """The blocks of every group of layers, the first included; GONE where no later row reads one."""
    room: int = 0
    """Leading tokens for which every group has blocks."""
    num_full: int = 0
    """Leading blocks that are full and whose tokens are known: those that the prefix cache has heard of."""
    hashes: list[int] = field(default_factory=list)
    """Prefix hashes of leading full blocks, as far as they were asked for; they outlast the blocks."""
    state_slot: int = NOWHERE
    """Slot of the recurrent state, in bases whose layers carry one from token to token."""
    stop: int = NEVER
    """Position where a chunk must end, so that the state there can be kept."""
    stops: list[int] = field(default_factory=list)
    """Such positions beside the regular ones, chosen when the sequence was admitted."""

    # runner.Runner and graph_runner.GraphRunner
    drawing: bytes = b""
    """Parameters of its draws, in the sampling kernel's layout; made at the first draw."""
    prompt_scores: list[Token] = field(default_factory=list)
    """Leading tokens of the prompt with log probabilities, where those are asked for; the first has none."""
    num_scored: int = 0
    """Leading tokens of the prompt whose scores are known or being computed."""
    num_pooled: int = 0
    """Leading tokens whose hidden states are in the mean, where that is asked for; recomputed ones do not count
    twice."""

    def restart(self) -> None:
        """Drop what steps began that were never resolved; the known tokens stay."""
        self.in_flight = self.num_pooled = 0
        self.num_scored = len(self.prompt_scores)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_pending(self) -> int:
        """Tokens that have no keys and values yet, those in flight included."""
        return len(self.tokens) + self.in_flight - self.num_computed


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Sequence:
    """The request for one answer, as the engine takes it, with its progress."""

    id: str
    prompt: Seq[int]
    """Tokens."""
    sampling: SamplingParams
    adapter: Adapter | Mixture | None = None
    """None is the base."""
    priority: int = 0
    """Higher first."""
    deadline_s: float | None = None
    """On the clock of ``time.monotonic``."""
    grammar: Grammar | None = None
    """Follows the constraint of the answer; it has accepted the known tokens of the answer."""
    invocation: int = 0
    """Position of the first token that the adapter acts on; tokens before it are computed by the base alone."""
    pooling: Pooling | None = None
    """Pooling of the hidden states into a vector, which is the answer; no tokens are drawn, and `max_tokens` is
    0. None: tokens are drawn.
    """
    second: int = NEVER
    """Position of the first token of a pair's second text, which encoders mark."""
    cache_salt: str = ""
    """Part of every prefix-cache key, as the adapter is."""
    model: str = ""
    """The name of the model that answers, which can be the base's."""
    counted: tuple[str, ...] = ()
    """The names that the sequence is counted under, where they differ: of a mixture, those of its adapters."""
    flow: str = ""
    """Queue whose tokens are counted together: queues are served in turns, and within one by priority and
    arrival.
    """
    share: Share = FAIR
    """Share of its queue."""
    key_id: str = ""
    """API key of the request; empty: none was needed."""

    num_prompt: int = field(init=False)
    progress: Progress = field(init=False, repr=False)

    def __post_init__(self) -> None:
        progress = Progress(list(self.prompt))
        if self.sampling.prompt_logprobs is not None:
            progress.prompt_scores.append(Token(self.prompt[0]))
            progress.num_scored = 1
        object.__setattr__(self, "num_prompt", len(self.prompt))
        object.__setattr__(self, "progress", progress)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, those in flight included."""
        return len(self.progress.tokens) + self.progress.in_flight - self.num_prompt

    @property
    def num_known(self) -> int:
        """Tokens of the answer that are known here."""
        return len(self.progress.tokens) - self.num_prompt

    def looks_back(self, generated: int) -> bool:
        """Return whether more than a grammar shapes the token behind so many of the answer: what may need all
        tokens before.
        """
        return generated < self.sampling.num_shaped

    @property
    def scores_prompt(self) -> bool:
        """True while log probabilities of the prompt are asked for and not all being computed."""
        scored = self.sampling.prompt_logprobs is not None
        return scored and self.progress.num_scored < self.num_prompt

    @property
    def needs_every_row(self) -> bool:
        """True while the prompt must be computed row by row, whatever the prefix cache holds."""
        return self.scores_prompt or self.pooling is Pooling.MEAN

    @property
    def bound(self) -> int:
        """Position that the next chunk must not pass: a stop, or where the adapter begins to act."""
        progress = self.progress
        return min(progress.stop, self.invocation) if progress.num_computed < self.invocation else progress.stop

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Adapters that must be resident; none for the base."""
        return () if self.adapter is None else self.adapter.members

    @property
    def slot(self) -> int | ScaledSlots:
        """Slot of the adapter that acts on the next chunk, or the slots of a mixture; -1 for the base. Raise
        RuntimeError for an adapter that is not resident, so that no step may have this sequence.
        """
        if self.adapter is None or self.progress.num_computed < self.invocation:
            return -1
        slot = self.adapter.slot
        if slot is None:
            raise RuntimeError(f"adapter {self.adapter.digest[:12]} is in a step, and not in the bank")
        return slot

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of admission: priority, then arrival."""
        return (-self.priority, self.progress.arrival)


@dataclass(slots=True)
class StepOutput:
    """The result of one step for one sequence; the last output of a sequence has a finish reason."""

    seq_id: str
    token: Token | None
    finish: EndReason | None = None
    first: bool = False
    """True for the first token of an answer."""
    prompt: tuple[Token, ...] = ()
    """The scored tokens of the prompt, with the first output, where their log probabilities are asked for."""
    fault: Fault | None = None
    """Why the sequence failed, where that is known: the adapter cannot be loaded, or values are no numbers."""
    pooled: Vector | None = None
    """The pooled hidden states, where a vector is asked for."""


@dataclass(slots=True)
class Chunk:
    """Consecutive tokens of one sequence, from ``num_computed`` on."""

    seq: Sequence
    length: int
    drafted: int = 0
    """Tokens at the end that are drafts; the draw behind each of them verifies it."""

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.seq.progress.num_computed

    @property
    def end(self) -> int:
        """Position behind the last token: the length of the context that the chunk attends to."""
        return self.seq.progress.num_computed + self.length

    @property
    def samples(self) -> bool:
        """True when the chunk reaches the sequence's end, so that a token is drawn from the row there."""
        return self.length - self.drafted == self.seq.progress.num_pending


@dataclass(frozen=True)
class Batch:
    """The chunks of one step."""

    chunks: tuple[Chunk, ...]
    drafts: Mapping[Sequence, list[int]] = field(default_factory=dict)
    """The drafted tokens of the sequences that have some."""
    copies: tuple[Mapping[int, int], ...] = ()
    """Copies among state slots before the step, by destination: the source. All of a mapping are read before
    any is written, and mappings follow one another."""

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return sum(chunk.length for chunk in self.chunks)
