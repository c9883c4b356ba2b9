"""What messages and their failures look like; `openapi` makes schemas of it.

Source: `anthropic.types.Message` and `anthropic.types.RawMessageStreamEvent`
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
    """What was thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class CallBlock(TypedDict):
    """A call."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OutputTokens(TypedDict):
    """How many tokens of the answer were thinking."""

    thinking_tokens: int


class MessageUsage(TypedDict):
    """Tokens; those of the input without what was found in the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: NotRequired[OutputTokens]
    """Where something was thought."""


class AnthropicMessage(TypedDict):
    """An answer."""

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
    """An event of a stream; its type says which other fields it has."""

    type: Literal[
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop", "ping", "error",
    ]  # fmt: skip


class TokenCount(TypedDict):
    """Tokens of a prompt."""

    input_tokens: int


class FailureDetails(TypedDict):
    """By which clients know what to leave out."""

    error_code: str


class MessageFailure(TypedDict):
    """Why a request failed."""

    type: str
    message: str
    details: NotRequired[FailureDetails]


class MessageError(TypedDict):
    """A failure."""

    type: Literal["error"]
    error: MessageFailure
    request_id: str | None
