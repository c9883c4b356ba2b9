"""The request of an API, and the events that answer it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, NamedTuple

from inference_service.core.adapter import ScaledAdapter
from inference_service.core.constraint import ByEnding, Constraint
from inference_service.core.sampling import Sampling
from inference_service.core.sequence import EndReason, Token, Vector
from inference_service.core.served_model import ServedModel
from inference_service.text.text import Text
from loramux_shared.faults import RequestInvalid
from loramux_shared.runtime import Pooling

Message = Mapping[str, Any]
"""A turn as chat templates know it: role, content (text or None), and name, tool_calls, tool_call_id,
reasoning_content and reasoning (both the same)."""


class TextPair(NamedTuple):
    """Two texts that the model reads together, as the tokenizer joins them."""

    first: str
    second: str


TruncationSide = Literal["left", "right"]
PromptContent = str | list[int] | list[Message] | TextPair
"""Text, token ids, chat messages, or two texts."""


@dataclass(frozen=True)
class ResolvedModel:
    """The model of a name when it was looked up."""

    model: ServedModel
    generation: int
    """The generation of the deployment in which the name was looked up."""


@dataclass(frozen=True)
class ModelReference:
    """The model that is to answer a request."""

    name: str = ""
    """A name, an alias, ``NAME@DIGEST``, ``BASE:NAME``, ``NAME*SCALE+NAME``: see `catalog.Catalog.resolve`."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """Adapters with scales; the name is empty or the base's then."""
    lora_path: str | None = None
    """An adapter of the base that the name stands for, or the named adapter again, as SGLang's clients say."""
    min_generation: int = 0
    """The name is looked up in this generation of the deployment, or in a later one."""
    sticky_key: str = ""
    """Requests with the same key get the same model of an alias."""
    served: ResolvedModel | None = None
    """The result of a lookup that was made already, as for the prompts of one call together."""


@dataclass(frozen=True)
class RequestPrompt:
    """The prompt of a request, and how it becomes tokens."""

    content: PromptContent
    tools: tuple[Mapping[str, Any], ...] = ()
    """Rendered by the chat template."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template beside the usual ones, such as ``enable_thinking``."""
    add_generation_prompt: bool = True
    """End rendered messages with the beginning of the assistant's turn."""
    continue_final_message: bool = False
    """End rendered messages within the last one, which the answers continue."""
    add_special_tokens: bool | None = None
    """Tokenize with the special tokens that the tokenizer adds itself; None: for texts, not for messages."""
    truncate_prompt_tokens: int | None = None
    """Leave out the beginning of a prompt with more tokens; -1: of one that leaves the answer no room."""
    truncation_side: TruncationSide | None = None
    """The end of a longer text that is left out, while its special tokens stay; None: the right one of an
    encoder's texts, and of others the first tokens, special ones too."""


@dataclass(frozen=True)
class OutputOptions:
    """The answers of a request: how many, of which kind and in which form."""

    n: int = 1
    """Answers; the first is the one that a request for one would have, the others have seeds of their own."""
    pooling: Pooling | None = None
    """How the prompt's hidden states become a vector, where that is the answer; max_tokens is 0 then."""
    constraint: Constraint | None = None
    constraint_by_ending: ByEnding | None = None
    """The constraint where it depends on how the rendered prompt ends; takes precedence."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    shown_special_tokens: tuple[str, ...] = ()
    """Special tokens that stay in the text all the same, where the tokenizer has them."""


@dataclass(frozen=True)
class SchedulingOptions:
    """The place of a request beside others: its order, its end, and whose cached prompts it may use."""

    priority: int = 0
    """Higher first."""
    deadline_s: float | None = None
    """On the clock of ``time.monotonic``."""
    cache_salt: str | None = None
    """Only requests with the same salt find each other's prompts in the prefix cache."""


NO_SAMPLING: Final = Sampling()
ONE_ANSWER: Final = OutputOptions()
NO_PREFERENCE: Final = SchedulingOptions()
"""Parts of a request that says nothing about them."""


@dataclass(frozen=True)
class Request:
    """A request for one or more answers; in every part, None means that the client left a field unset."""

    model: ModelReference
    prompt: RequestPrompt
    sampling: Sampling = NO_SAMPLING
    """How the tokens of the answers are drawn, and when the answers end."""
    output: OutputOptions = ONE_ANSWER
    scheduling: SchedulingOptions = NO_PREFERENCE
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """For logs, traces and the client; nothing is looked up by it, and two requests may have the same."""

    @classmethod
    def of(cls, model: str, prompt: PromptContent, **flat: Any) -> Request:
        """Return a request from the fields of all its parts side by side, as the APIs' field tables have them.

        A field of the sampling that is None is not set.
        """
        parts: dict[str, dict[str, Any]] = {part: {} for part in _KINDS}
        own = {"id": flat.pop("id")} if "id" in flat else {}
        for name, value in flat.items():
            part = PARTS[name]
            if value is not None or part != "sampling":
                parts[part][name] = value
        return cls(
            ModelReference(model, **parts["model"]),
            RequestPrompt(prompt, **parts["prompt"]),
            Sampling(**parts["sampling"]) if parts["sampling"] else NO_SAMPLING,
            OutputOptions(**parts["output"]) if parts["output"] else ONE_ANSWER,
            SchedulingOptions(**parts["scheduling"]) if parts["scheduling"] else NO_PREFERENCE,
            **own,
        )

    def value_of(self, name: str) -> Any:
        """Return a field of one of the parts."""
        return getattr(getattr(self, PARTS[name]), name)

    def answered_by(self, served: ResolvedModel) -> Request:
        """Return the request with the result of its lookup."""
        return replace(self, model=replace(self.model, served=served))


_KINDS: Final[Mapping[str, type]] = {
    "model": ModelReference,
    "prompt": RequestPrompt,
    "sampling": Sampling,
    "output": OutputOptions,
    "scheduling": SchedulingOptions,
}
PARTS: Final[Mapping[str, str]] = {each.name: part for part, kind in _KINDS.items() for each in fields(kind)}
"""The part of a request that has a field, by the field's name."""


@dataclass(frozen=True)
class AnswerStarted:
    """The request was accepted."""

    request_id: str
    model: ServedModel
    """The model that answers, to the end."""
    generation: int
    """The generation in which its name was looked up."""
    prompt_tokens: int
    text: Text
    """The text side of the model that answers: its tokenizer and templates."""
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptScores:
    """Scored tokens of the prompt, where the request asks for them; sent once, before the first AnswerDelta."""

    tokens: tuple[Token, ...]
    """The first token has no log probability, since nothing stands before it."""


@dataclass(frozen=True)
class Pooled:
    """The hidden states of the prompt as one vector; sent once, in place of Deltas."""

    vector: Vector


WORDLESS: Final = 4
"""Tokens without text that are held back at the beginning of an answer: the bytes of a character."""


@dataclass(slots=True)
class AnswerDelta:
    """New text of an answer, and the tokens that were decoded for it."""

    text: str
    tokens: tuple[Token, ...]
    index: int = 0
    """Index of the answer among the n."""


@dataclass(frozen=True)
class TokenUsage:
    """The tokens of answers; each API has names of its own for them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache held."""
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answers."""
        return self.prompt_tokens + self.completion_tokens

    @classmethod
    def of(cls, answers: Iterable[AnswerFinished]) -> TokenUsage:
        """Return the tokens of the answers to one or more prompts, each of which counts once."""
        ends = list(answers)
        prompts = [end.usage for end in ends if not end.index]
        return cls(
            sum(prompt.prompt_tokens for prompt in prompts),
            sum(prompt.cached_tokens for prompt in prompts),
            sum(end.usage.completion_tokens for end in ends),
        )


@dataclass(frozen=True)
class AnswerFinished:
    """An answer is complete."""

    reason: EndReason
    stop_text: str
    usage: TokenUsage
    index: int = 0
    """Index of the answer among the n."""
    stop_token_id: int | None = None
    """The stop token that ended it, where the request named it and it is no end-of-sequence token."""


Event = AnswerStarted | PromptScores | Pooled | AnswerDelta | AnswerFinished


MIN_GENERATION: Final = "x-loramux-min-generation"
STICKY_KEY: Final = "x-loramux-key"
MAX_GENERATION: Final = 2**63 - 1
GENERATION_IN_HEADER: Final = "[0-9]{1,18}"
"""Pattern of a generation in a header, which is a text there: each number of 18 digits is one."""


class Hints(NamedTuple):
    """Fields of a `ModelReference` that can also be given in headers or metadata."""

    min_generation: int
    sticky_key: str


def hinted(headers: Mapping[str, str], min_generation: int = 0, sticky_key: str = "") -> Hints:
    """Return what headers and the body say together.

    Of two generations the higher one counts; a header's key takes precedence, since proxies set headers. Raise
    RequestInvalid for a header that is no number of a generation.
    """
    header = headers.get(MIN_GENERATION, "0")
    if not re.fullmatch(GENERATION_IN_HEADER, header):
        raise _out_of_bounds(MIN_GENERATION, repr(header[:80]))
    least = max(int(header), min_generation)
    if least > MAX_GENERATION:
        raise _out_of_bounds("min_generation", str(least))
    return Hints(least, headers.get(STICKY_KEY) or sticky_key)


def _out_of_bounds(where: str, found: str) -> RequestInvalid:
    expected = f"the number of a generation, 0 to {MAX_GENERATION}"
    return RequestInvalid.of_field("the generation is not valid.", where, expected, found)
