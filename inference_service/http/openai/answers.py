"""What answers of chat and of plain completions look like, whole and in chunks; `openapi` makes schemas of it.

Sources: OpenAI's API reference; vLLM's for stop reasons, token ids and log probabilities of prompts.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

Ended = Literal["stop", "length"]
ChatEnded = Literal["stop", "length", "tool_calls"]


class PromptDetails(TypedDict):
    """How many tokens of the prompt were found in the prefix cache."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """How many tokens of the answers were decoded while they reasoned."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Tokens; a prompt counts once, whatever its answers. The details are told at the end alone."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: NotRequired[CompletionDetails]
    """Of answers that reasoned."""
    prompt_tokens_details: NotRequired[PromptDetails]


class RankedToken(TypedDict):
    """A token of the prompt as vLLM tells it."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]
"""By token id; null for the first token of the prompt."""


class TopLogprob(TypedDict):
    """One of the most likely tokens."""

    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of the tokens of an answer, or of a chunk."""

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
    """An answer; the content is null where there are calls and nothing else was said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    """What was thought."""
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
    """More of an answer; the last chunk of one has nothing more."""

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
    """More of the answers to a chat; the last one, without choices, has the usage where it was asked for."""

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
    """Of the tokens of an answer or a chunk, each list with one item a token; of a prompt's first one null."""

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
    """More of the answers; the last one, without choices, has the usage where it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[PlainAnswerPart]
    usage: NotRequired[Usage | None]
