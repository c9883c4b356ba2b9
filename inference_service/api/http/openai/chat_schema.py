"""The body of a chat request; the rules of turns and tools are those of `requests.bounds`."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, model_validator, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from inference_service.api.chat.request import AllowedTools, NamedTool, ToolChoice
from inference_service.api.http.openai.schema import (
    BY_ROLE,
    GOES_ON,
    HAS_FORM,
    NOT_NULL,
    SAYS_SOMETHING,
    SCHEMA_BY_TYPE,
    GenerationBody,
    Variables,
)
from inference_service.api.http.wire.body import (
    HAS_TOOLS,
    OPEN,
    Body,
    Examples,
    Made,
    Noun,
    at_least_one,
    having,
    only,
    unsupported,
)
from inference_service.api.requests.bounds import NAME, ROLES

TEXT_PARTS: Final = {"text": "text", "refusal": "refusal"}
"""Content parts that hold text, and their key for it."""
EXPECTED_CHOICE = (
    'none, auto, required, {"type": "function", "function": {"name": "..."}} '
    'or {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [...]}}'
)


def _flat(content: Any) -> Any:
    """Join the text parts of a content that comes in parts: templates expect a string."""
    if not isinstance(content, list):
        return content
    return "\n".join(map(text_of, content))


def text_of(part: Any, kinds: Mapping[str, str] = TEXT_PARTS) -> str:
    """Return a part's text, by the kinds that have one and their keys for it; raise PydanticCustomError."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in kinds:
        raise unsupported(f"a part of type {kind}", "Only text parts are served.")
    key = kinds.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if key else None
    if not isinstance(text, str):
        [(kind, key), *_] = kinds.items()
        example = {"type": kind, key: "..."}
        raise PydanticCustomError("content", "parts like {example}", {"example": json.dumps(example)})
    return text


@with_config(OPEN)
class TextPart(TypedDict):
    """A part of a content."""

    type: Literal["text"]
    text: str


@with_config(OPEN)
class RefusalPart(TypedDict):
    """A part of an earlier assistant message."""

    type: Literal["refusal"]
    refusal: str


Content = Annotated[
    str | None, BeforeValidator(_flat, json_schema_input_type=str | list[TextPart | RefusalPart] | None)
]
FunctionType = Annotated[
    Literal["function"], only(("function",), "Only functions are served.", Literal["function"])
]


OnlyText = Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)]


class CalledFunction(Body):
    """The function of a call."""

    name: Annotated[str, Field(json_schema_extra={"minLength": 1})]
    arguments: str
    """A JSON object, as the model wrote it."""


class ToolCall(Body):
    """A call that the assistant made earlier."""

    id: str
    type: FunctionType
    function: CalledFunction


class ChatMessage(Body):
    """A turn of the conversation."""

    model_config = ConfigDict(json_schema_extra=BY_ROLE | SAYS_SOMETHING)

    role: Annotated[str, Field(json_schema_extra={"enum": ["developer", *ROLES]})]
    content: Content = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """Reasoning of the assistant: for the template, which mostly leaves out that of earlier turns."""
    reasoning: str | None = None
    """The same, under vLLM's newer name."""
    annotations: list[Any] | None = None
    """Accepted: clients send back what they got."""
    audio: None = None
    function_call: None = None

    @property
    def thought(self) -> str | None:
        """Return the assistant's reasoning, under either name."""
        return self.reasoning_content if self.reasoning is None else self.reasoning

    @model_validator(mode="after")
    def _complete(self) -> Self:
        contents = (self.content, self.refusal, self.thought)
        if not self.tool_calls and all(each is None for each in contents):
            raise PydanticCustomError("content", "a message with content")
        if None not in (self.reasoning, self.reasoning_content) and self.reasoning != self.reasoning_content:
            raise PydanticCustomError("reasoning", "reasoning the same as reasoning_content, or one of the two")
        return self


Messages = Annotated[
    tuple[ChatMessage, ...], at_least_one("messages", "message"), Field(json_schema_extra={"minItems": 1})
]


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Optional calls keep to the schema, too; required calls always do."""


class Tool(Body):
    """A tool that the model may use."""

    type: FunctionType
    function: Function


def _choice(value: Any) -> ToolChoice | None:
    match value:
        case None | "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name)}}:
            return NamedTool(name)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]},
        }:
            return AllowedTools(mode, tuple(map(_allowed, tools)))
        case {"type": str(kind)} if kind not in ("function", "allowed_tools"):
            raise unsupported(f"a choice of type {kind}", "Served are none, auto, required and functions.")
    raise PydanticCustomError("tool_choice", EXPECTED_CHOICE)


def _allowed(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    raise PydanticCustomError("tool_choice", EXPECTED_CHOICE)


@with_config(OPEN)
class ChosenFunction(TypedDict):
    """The function that must be called."""

    name: str


@with_config(OPEN)
class ChosenTool(TypedDict):
    """A choice that is a function."""

    type: Literal["function"]
    function: ChosenFunction


@with_config(OPEN)
class AllowedChoice(TypedDict):
    """The tools that may be called, or must be."""

    mode: Literal["auto", "required"]
    tools: list[ChosenTool]


@with_config(OPEN)
class AllowedChoices(TypedDict):
    """A choice that is several functions."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedChoice


ToolChoiceInput = Literal["none", "auto", "required"] | ChosenTool | AllowedChoices | None


class JsonSchema(Body):
    """The schema of a `response_format`."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Accepted; the answer always keeps to the schema."""


class ResponseFormat(Body):
    """The form of the answer."""

    model_config = ConfigDict(json_schema_extra=SCHEMA_BY_TYPE)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema if and only if the type is json_schema")
        return self


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
"""Reasoning effort, in OpenAI's spelling."""


class ChatTurns(Body):
    """The fields that become the prompt of a chat."""

    model_config = ConfigDict(json_schema_extra=GOES_ON)

    messages: Messages
    tools: Made[tuple[Tool, ...] | None] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables | None = None
    """vLLM's: variables of the chat template beside the usual ones."""


DEMANDS: Final[dict[str, Any]] = {
    "anyOf": [{"const": "required"}, {"type": "object", **having("type", {"const": "function"})}]
}
"""Schema of a choice that demands a call."""
RULES: Final[tuple[dict[str, Any], ...]] = (
    GOES_ON,
    {"if": having("top_logprobs", NOT_NULL), "then": having("logprobs", {"const": True})},
    {"if": having("tool_choice", DEMANDS), "then": HAS_TOOLS},
    {
        "if": having("response_format", {"type": "object", **having("type", HAS_FORM)}),
        "then": {"properties": {"structured_outputs": {"type": "null"}}},
    },
)
"""Rules between the fields of `ChatBody`, for readers of its schema."""


class ChatBody(ChatTurns, GenerationBody):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(json_schema_extra={"allOf": list(RULES)})
    examples: ClassVar[Examples] = {
        "question": {"messages": [{"role": "user", "content": "My order is late."}], "max_tokens": 8},
        "stream": {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "scored": {
            "messages": [{"role": "user", "content": "Yes or no?"}],
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "seed": 1,
        },
        "structured": {
            "messages": [{"role": "user", "content": "Yes or no?"}],
            "max_tokens": 8,
            "structured_outputs": {"choice": ["yes", "no"]},
        },
    }

    max_completion_tokens: Annotated[int | None, Noun("max_tokens")] = None
    """The newer name of max_tokens; of both, the smaller one counts."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Noun("logprobs", taken=False)] = None
    response_format: ResponseFormat | None = None
    tool_choice: Annotated[
        ToolChoice | None, PlainValidator(_choice, json_schema_input_type=ToolChoiceInput)
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    """vLLM's: false leaves the reasoning out."""
    modalities: Annotated[
        OnlyText | None, only((None, ["text"]), 'Only ["text"] is served.', OnlyText | None)
    ] = None

    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    verbosity: None = None
    moderation: None = None
