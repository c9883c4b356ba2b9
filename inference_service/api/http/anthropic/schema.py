"""The bodies of Anthropic's routes, and the content of messages: blocks, each of a type.

As everywhere in this API, a field whose type is None is refused by name, and null is "not set".
"""

from collections.abc import Callable, Collection
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from inference_service.api.http.wire.body import (
    HAS_TOOLS,
    Body,
    Examples,
    Made,
    Noun,
    Same,
    at_least_one,
    having,
    only,
    unsupported,
)
from inference_service.api.requests.bounds import NAME

BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
BLOCKS_OF = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
"""Types of blocks by role."""
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


DEMANDS: dict[str, Any] = {"enum": ["any", "tool"]}
"""Schema of the types of a choice that demand a call."""
NAME_OF_TOOL: dict[str, Any] = {
    "oneOf": [
        {"required": ["name"], "properties": {"type": {"const": "tool"}, "name": {"type": "string"}}},
        {"properties": {"type": {"enum": ["auto", "any", "none"]}, "name": {"type": "null"}}},
    ]
}
"""The rule of `ToolChoice`, for readers of its schema."""


BLOCKS_BY_ROLE: dict[str, Any] = {
    "oneOf": [
        {
            "properties": {
                "role": {"const": role},
                "content": {"items": {"properties": {"type": {"enum": list(kinds)}}}},
            }
        }
        for role, kinds in BLOCKS_OF.items()
    ]
}
"""The types of blocks of each role, for readers of the schema; the mapping refuses others."""


class Message(Body):
    """A turn of the conversation."""

    model_config = ConfigDict(json_schema_extra=BLOCKS_BY_ROLE)

    role: Literal["user", "assistant", "system"]
    content: Content


def _custom(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "custom"):
        raise unsupported(f"a tool of type {str(kind)[:80]}", "Only tools of type custom are served.")
    return tool


Directly = Annotated[list[Literal["direct"]], Field(min_length=1, max_length=1)]


def _at_once(deferred: Any) -> Any:
    if deferred is True:
        raise unsupported("true", "Tools are offered from the start: leave it out, or the tool.")
    return deferred


class CustomTool(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: Annotated[Name, Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    """The model reads them with the description."""
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Accepted: inputs stream as they come."""
    defer_loading: Annotated[
        bool | None, BeforeValidator(_at_once, json_schema_input_type=Literal[False] | None)
    ] = None
    allowed_callers: Annotated[
        list[str] | None, only((None, ["direct"]), 'Only ["direct"] is served.', Directly | None)
    ] = None


Tool = Annotated[CustomTool, BeforeValidator(_custom, json_schema_input_type=CustomTool)]


class ToolChoice(Body):
    """The choice of tools: whether, and which, the model must call."""

    model_config = ConfigDict(json_schema_extra=NAME_OF_TOOL)

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("tool_choice", "a name if and only if the type is tool")
        return self


class Thinking(Body):
    """Options of reasoning before the answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    """Accepted; the bound of an answer is max_tokens."""
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    name: str | None = None


class OutputConfig(Body):
    """Options of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Annotated[OutputFormat | None, Noun("response_format", taken=False)] = None
    task_budget: None = None


class Metadata(Body):
    """The end user of the request."""

    user_id: str | None = None


class ThinkingToKeep(Body):
    """The one context edit without effect, which Claude Code requests."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


def _changes_nothing(edit: Any) -> Any:
    kind, keep = (edit.get("type"), edit.get("keep")) if isinstance(edit, dict) else (edit, None)
    if (kind, keep) != ("clear_thinking_20251015", "all"):
        raise unsupported(
            f"an edit {kind}",
            "Context editing is not supported: send only the messages that the model should read.",
        )
    return edit


Edit = Annotated[ThinkingToKeep, BeforeValidator(_changes_nothing, json_schema_input_type=ThinkingToKeep)]


class ContextManagement(Body):
    """The parts to leave out of a long conversation."""

    edits: list[Edit] | None = None


class PromptBody(Body):
    """The fields that become the prompt, and that both routes read."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": having("tool_choice", {"type": "object", **having("type", DEMANDS)}),
            "then": HAS_TOOLS,
        }
    )
    model: Same[str]
    messages: Annotated[
        list[Message], at_least_one("messages", "message"), Field(json_schema_extra={"minItems": 1})
    ]
    system: Texts | None = None
    tools: Made[list[Tool] | None] = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The older name of output_config.format."""

    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None
    speed: Annotated[
        Literal["standard"] | None,
        only((None, "standard"), "Only standard is served.", Literal["standard"] | None),
    ] = None

    billing_policy: None = None
    compaction: None = None
    container: None = None
    mcp_servers: None = None
    thread: None = None


class CountBody(PromptBody):
    """``POST /v1/messages/count_tokens``."""

    examples: ClassVar[Examples] = {
        "messages": {"messages": [{"role": "user", "content": "Hello"}], "system": "Be brief."}
    }


class MessagesBody(PromptBody):
    """``POST /v1/messages``."""

    examples: ClassVar[Examples] = {
        "message": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
        "stream": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Once"}]}],
            "max_tokens": 8,
            "stream": True,
        },
        "tool": {
            "messages": [{"role": "user", "content": "Look at the sky."}],
            "max_tokens": 8,
            "tools": [{"name": "look", "input_schema": {"type": "object", "properties": {}}}],
            "tool_choice": {"type": "any"},
        },
    }

    max_tokens: Same[Annotated[int, Field(ge=1)]]
    stop_sequences: Annotated[list[str] | None, Noun("stop", taken=False)] = None
    stream: bool | None = None
    temperature: Same[Annotated[float, Field(ge=0, le=1)] | None] = None
    top_p: Same[float | None] = None
    top_k: Same[Annotated[int, Field(ge=0)] | None] = None

    metadata: Metadata | None = None
    """Its user_id picks among the models of an alias, as `user` does in a chat."""
    service_tier: str | None = None
    inference_geo: str | None = None

    diagnostics: None = None
    fallbacks: None = None
    fallback_credit_token: None = None
