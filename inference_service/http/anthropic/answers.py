"""The answers of Anthropic's routes: a message, the events of one that is streamed, a count of tokens.

Source: `anthropic.types.Message` and `anthropic.types.RawMessageStreamEvent`
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import ReadOnly, TypedDict


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

    type: ReadOnly[EventKind]


class MessageStart(MessageEvent):
    """The message before anything is answered."""

    type: Literal["message_start"]
    message: AnthropicMessage


class BlockStart(MessageEvent):
    """A block of the content begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class TextDelta(TypedDict):
    """More text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    """More thinking."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    """The signature of a block of thinking."""

    type: Literal["signature_delta"]
    signature: str


class InputDelta(TypedDict):
    """More of the input of a call, as JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(MessageEvent):
    """More of a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(MessageEvent):
    """A block is complete."""

    type: Literal["content_block_stop"]
    index: int


class Ending(TypedDict):
    """The end of a message."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(MessageEvent):
    """The end of a message, with its tokens."""

    type: Literal["message_delta"]
    delta: Ending
    usage: MessageUsage


class MessageStop(MessageEvent):
    """The last event."""

    type: Literal["message_stop"]


class Ping(MessageEvent):
    """A sign that the stream is alive."""

    type: Literal["ping"]


class TokenCount(TypedDict):
    """Tokens of a prompt."""

    input_tokens: int
