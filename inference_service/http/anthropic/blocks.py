"""The content of messages: blocks, each of a type."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from inference_service.http.wire.body import Body, unsupported

BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
Name = Annotated[str, Field(min_length=1)]


def only_types(kinds: Collection[str]) -> Callable[[Any], Any]:
    """Return a validator that refuses blocks of other types by name, before what else is wrong with them."""

    def check(block: Any) -> Any:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise PydanticCustomError("block", 'a block like {"type": "text", "text": "..."}')
        if kind not in kinds:
            raise unsupported(f"a block of type {kind}", f"Served: {', '.join(kinds)}.")
        return block

    return check


def as_blocks(content: Any) -> Any:
    """Return the blocks that a content is short for: a string is one of text."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class CacheControl(Body):
    """The end of the cached part of a prompt; accepted, since all prompts are cached."""

    type: Literal["ephemeral"]
    ttl: str | None = None
    scope: str | None = None


class CacheableBlock(Body):
    """A part of a content."""

    cache_control: CacheControl | None = None


class TextBlock(CacheableBlock):
    """Text."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = None
    """Accepted: clients send back what they got."""


Text = Annotated[TextBlock, BeforeValidator(only_types(("text",)), json_schema_input_type=TextBlock)]
Texts = Annotated[list[Text], BeforeValidator(as_blocks, json_schema_input_type=str | list[TextBlock])]
"""Text alone: a string, or blocks."""


class ToolUseBlock(CacheableBlock):
    """A call that the assistant made earlier."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    """Accepted: clients send back what they got."""
    toolset_name: None = None


class ToolResultBlock(CacheableBlock):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Texts | None = None
    is_error: bool | None = None
    toolset_name: None = None


class ThinkingBlock(CacheableBlock):
    """Earlier reasoning of the assistant."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    """Accepted; it is not verified."""


class RedactedThinkingBlock(CacheableBlock):
    """Earlier reasoning of another server's assistant, which only that server can read."""

    type: Literal["redacted_thinking"]
    data: str


def _type_of(block: Any) -> str:
    return f"[{block['type'] if isinstance(block, dict) else block.type}]"


AnyBlock = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ToolUseBlock, Tag("[tool_use]")]
    | Annotated[ToolResultBlock, Tag("[tool_result]")]
    | Annotated[ThinkingBlock, Tag("[thinking]")]
    | Annotated[RedactedThinkingBlock, Tag("[redacted_thinking]")],
    Discriminator(_type_of),
    BeforeValidator(
        only_types(BLOCKS),
        json_schema_input_type=TextBlock
        | ToolUseBlock
        | ToolResultBlock
        | ThinkingBlock
        | RedactedThinkingBlock,
    ),
]
"""Places in it name the block and not its type: `errors.param_of` leaves tags out."""
Content = Annotated[list[AnyBlock], BeforeValidator(as_blocks, json_schema_input_type=str | list[AnyBlock])]
