"""The answers of chat and of plain completions, whole and in chunks, and what both say of ends and tokens.

Sources: OpenAI's API reference; vLLM's for stop reasons, token ids and log probabilities of prompts.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NotRequired

from typing_extensions import TypedDict

from inference_service.core.request import AnswerDelta, AnswerFinished, AnswerStarted, Event, TokenUsage
from inference_service.core.sequence import EndReason

Ended = Literal["stop", "length"]
ChatEnded = Literal["stop", "length", "tool_calls"]


class PromptDetails(TypedDict):
    """The number of the prompt's tokens that were found in the prefix cache."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """The number of the answers' tokens that were decoded as reasoning."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Tokens; a prompt counts once, whatever its answers. Only the end has the details."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: NotRequired[CompletionDetails]
    """Details of answers with reasoning."""
    prompt_tokens_details: NotRequired[PromptDetails]


class RankedToken(TypedDict):
    """A token of the prompt, in vLLM's words."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]
"""Log probabilities by token id; null for the first token of the prompt."""


class PromptPart(TypedDict, total=False):
    """The report about a prompt where a request asks for it: with the answer, or with its first chunk."""

    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs


class TopLogprob(TypedDict):
    """One of the most likely tokens."""

    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most likely alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of the tokens of an answer, or of a chunk."""

    content: list[TokenLogprob]
    refusal: None


class MadeFunction(TypedDict):
    """The function that is called, and its arguments as JSON text."""

    name: str
    arguments: str


class MadeCall(TypedDict):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class MadeMessage(TypedDict):
    """An answer; the content is null if it only has calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    """Reasoning of the model."""
    reasoning: NotRequired[str]
    """The same once more, under vLLM's newer name."""
    tool_calls: NotRequired[list[MadeCall]]


class ChatAnswer(TypedDict):
    """One of the answers."""

    index: int
    message: MadeMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnded
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatAnswer]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class FunctionPart(TypedDict):
    """The name of a called function, once, and its arguments in pieces."""

    name: NotRequired[str]
    arguments: str


class CallPart(TypedDict):
    """More of a call; the first part has its id and its name."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionPart


class MessagePart(TypedDict, total=False):
    """More of an answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str
    reasoning: str
    tool_calls: list[CallPart]


class ChatAnswerPart(TypedDict):
    """More of one of the answers."""

    index: int
    delta: MessagePart
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnded | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """More of the answers to a chat; the last one, without choices, has the usage if requested."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatAnswerPart]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class PlainLogprobs(TypedDict):
    """Log probabilities of an answer's or a chunk's tokens, each list with one item a token; a prompt's first
    is null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PlainAnswer(TypedDict):
    """One of the answers to one of the prompts."""

    index: int
    text: str
    logprobs: PlainLogprobs | None
    finish_reason: Ended
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(TypedDict):
    """The answers to plain prompts; answer k to prompt i has index n * i + k."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[PlainAnswer]
    usage: Usage


class PlainAnswerPart(TypedDict):
    """More of one of the answers."""

    index: int
    text: str
    logprobs: PlainLogprobs | None
    finish_reason: Ended | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class CompletionChunk(TypedDict):
    """More of the answers; the last one, without choices, has the usage if requested."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[PlainAnswerPart]
    usage: NotRequired[Usage | None]


REASONS: Final[Mapping[EndReason, Ended]] = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}


def ended_by(finished: AnswerFinished, stops: Collection[str]) -> str | int | None:
    """Return vLLM's ``stop_reason``: the one of stops or of the request's stop tokens that ended it, if any."""
    return finished.stop_text if finished.stop_text in stops else finished.stop_token_id


def usage(finished: Iterable[AnswerFinished], reasoning: int = 0) -> Usage:
    """Return the tokens of the answers to one or more prompts.

    Reasoning tokens have a field of their own where there are any.
    """
    tokens = TokenUsage.of(finished)
    counted: Usage = {
        "prompt_tokens": tokens.prompt_tokens,
        "completion_tokens": tokens.completion_tokens,
        "total_tokens": tokens.total_tokens,
    }
    if reasoning:
        counted["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    counted["prompt_tokens_details"] = {"cached_tokens": tokens.cached_tokens}
    return counted


@dataclass
class Tally:
    """Counts the tokens of a prompt, and of each of its answers so far."""

    prompt: int = 0
    completion: Counter[int] = field(default_factory=Counter)
    """Tokens by the answer's index."""

    def see(self, event: Event) -> None:
        """Count the tokens of an event."""
        if isinstance(event, AnswerStarted):
            self.prompt = event.prompt_tokens
        elif isinstance(event, AnswerDelta):
            self.completion[event.index] += len(event.tokens)

    def usage(self, index: int) -> Usage:
        """Return the tokens of the prompt and of one answer."""
        completion = self.completion[index]
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": completion,
            "total_tokens": self.prompt + completion,
        }
