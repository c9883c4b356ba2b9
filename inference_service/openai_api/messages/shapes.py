"""What answers look like; `openapi` makes schemas of it.

Source: `anthropic.types`: Message, MessageTokensCount, ErrorResponse and the events of a stream.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict


class SaidBlock(TypedDict):
    """Text."""

    type: Literal["text"]
    text: str


class ThoughtBlock(TypedDict):
    """What was thought; the signature is a digest of it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class CallBlock(TypedDict):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OutputTokens(TypedDict):
    """How many tokens of the answer were thinking."""

    thinking_tokens: int


class MessageUsage(TypedDict):
    """Tokens of the prompt that had to be computed, that were found in the cache, and of the answer."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: NotRequired[OutputTokens]
    """Where something was thought."""


class MessageAnswer(TypedDict):
    """A message of the assistant, and how it ended."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[SaidBlock | ThoughtBlock | CallBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


@with_config(ConfigDict(extra="allow"))
class MessageEvent(TypedDict):
    """An event of a message; its type says which other fields it has."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]


class TokensCount(TypedDict):
    """How many tokens a prompt has."""

    input_tokens: int


class MessageErrorDetails(TypedDict):
    """What clients do without, where they read this."""

    error_code: str


class MessageErrorObject(TypedDict):
    """What went wrong: what was expected, what was found and what to do."""

    type: str
    message: str
    details: NotRequired[MessageErrorDetails]


class MessageError(TypedDict):
    """A request that failed, as Anthropic's clients read it."""

    type: Literal["error"]
    error: MessageErrorObject
    request_id: str | None
