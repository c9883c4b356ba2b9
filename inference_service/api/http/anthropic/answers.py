"""The answers of Anthropic's routes: a message, the events of one that is streamed, a count of tokens.

Source: `anthropic.types.Message` and `anthropic.types.RawMessageStreamEvent`
"""

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict


class AnswerTextBlock(TypedDict):
    """Text."""

    type: Literal["text"]
    text: str


class ThoughtBlock(TypedDict):
    """Reasoning of the assistant."""

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
    """The number of the answer's tokens that were thinking."""

    thinking_tokens: int


class MessageUsage(TypedDict):
    """Tokens; those of the input without what was found in the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: NotRequired[OutputTokens]
    """Details where the answer has reasoning."""


ContentBlock = AnswerTextBlock | ThoughtBlock | CallBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicMessage(TypedDict):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


EventKind = Literal[
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
    "message_stop", "ping", "error",
]  # fmt: skip


@with_config(ConfigDict(extra="allow"))
class MessageEvent(TypedDict):
    """An event of a stream; its type says which other fields it has."""

    type: EventKind


class Ending(TypedDict):
    """The end of a message."""

    stop_reason: StopReason
    stop_sequence: str | None


class TokenCount(TypedDict):
    """Tokens of a prompt."""

    input_tokens: int
