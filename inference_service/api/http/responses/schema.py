"""The body of ``POST /v1/responses``.

The fields are OpenAI's, and those of `SamplingBody`, which mean what they mean for chats. A field that would
need a store is refused with what to do instead. Source: the types of OpenAI's client,
`openai.types.responses.ResponseCreateParams`.
"""

from typing import Annotated, Any, ClassVar, Final, Literal, NotRequired, Self

from pydantic import ConfigDict, Field, PlainValidator, model_validator, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from inference_service.api.chat.request import AllowedTools, NamedTool, ToolChoice
from inference_service.api.http.openai.chat_schema import Effort
from inference_service.api.http.openai.schema import HAS_FORM, SamplingBody, Variables
from inference_service.api.http.responses.items import NOTHING_STORED, ONLY_FUNCTIONS, Input, Tools
from inference_service.api.http.wire.body import (
    HAS_TOOLS,
    OPEN,
    Body,
    Examples,
    Made,
    Noun,
    having,
    unserved,
    unsupported,
)
from inference_service.api.requests.bounds import MAX_LOGPROBS

LOGPROBS: Final = "message.output_text.logprobs"
CARRIED: Final = "reasoning.encrypted_content"
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""The last six ask for more of items that there never are here."""
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
EXPECTED_CHOICE: Final = (
    'none, auto, required, {"type": "function", "name": "..."} '
    'or {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "..."}]}'
)


@with_config(OPEN)
class NamedFunction(TypedDict):
    """A choice that is a function."""

    type: Literal["function"]
    name: str


@with_config(OPEN)
class NamedFunctions(TypedDict):
    """A choice that is some of the functions."""

    type: Literal["allowed_tools"]
    mode: NotRequired[Literal["auto", "required"] | None]
    tools: Annotated[list[NamedFunction], Field(min_length=1)]


ToolChoiceInput = Literal["none", "auto", "required"] | NamedFunction | NamedFunctions | None


def _choice(value: Any) -> ToolChoice | None:
    match value:
        case None | "none" | "auto" | "required":
            return value
        case {"type": "function", "name": str(name)}:
            return NamedTool(name)
        case {"type": "allowed_tools", "tools": [_, *_] as tools}:
            return AllowedTools(_mode(value.get("mode")), tuple(map(_allowed, tools)))
        case {"type": str(kind)} if kind not in ("function", "allowed_tools"):
            raise unsupported(f"a choice of type {kind}", ONLY_FUNCTIONS)
    raise PydanticCustomError("tool_choice", EXPECTED_CHOICE)


def _mode(mode: Any) -> Literal["auto", "required"]:
    if mode not in (None, "auto", "required"):
        raise PydanticCustomError("tool_choice", EXPECTED_CHOICE)
    return mode or "auto"


def _allowed(tool: Any) -> str:
    match tool:
        case {"type": "function", "name": str(name)}:
            return name
        case {"type": str(kind)} if kind != "function":
            raise unsupported(f"a tool of type {kind}", ONLY_FUNCTIONS)
    raise PydanticCustomError("tool_choice", EXPECTED_CHOICE)


NAMED_SCHEMA: Final[dict[str, Any]] = {
    "oneOf": [
        {
            "required": ["name", "schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "name": {"type": "string"},
                "schema": {"type": "object"},
            },
        },
        {"properties": {"type": {"enum": ["text", "json_object"]}, "schema": {"type": "null"}}},
    ]
}
"""The rule of `TextFormat`, for readers of its schema."""


class TextFormat(Body):
    """The form of the text."""

    model_config = ConfigDict(json_schema_extra=NAMED_SCHEMA)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Accepted; the text always keeps to the schema."""

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        needs_schema = self.type == "json_schema"
        if needs_schema != (self.schema_ is not None) or (needs_schema and self.name is None):
            raise PydanticCustomError("format", "name and schema if and only if the type is json_schema")
        return self


class TextConfig(Body):
    """Options of the text."""

    format: Annotated[TextFormat | None, Noun("response_format", taken=False)] = None
    verbosity: Annotated[None, unserved("Ask for it in instructions, or leave it out.", (None, "medium"))] = (
        None
    )


class Reasoning(Body):
    """Options of reasoning."""

    effort: Annotated[Effort | None, Noun("reasoning_effort", taken=False)] = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted, without effect: the item's content has the whole reasoning."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted: the older name."""
    context: Annotated[None, unserved("The chat template decides it.", (None, "auto"))] = None
    mode: Annotated[None, unserved('Only "standard" is served.', (None, "standard"))] = None


class StreamingOptions(Body):
    """Options of streams."""

    include_obfuscation: bool | None = None
    """Accepted; there is no padding here."""


RULES: Final[tuple[dict[str, Any], ...]] = (
    {"if": having("tool_choice", {"anyOf": [{"const": "required"}, {"type": "object"}]}), "then": HAS_TOOLS},
    {
        "if": having(
            "text", {"type": "object", **having("format", {"type": "object", **having("type", HAS_FORM)})}
        ),
        "then": {"properties": {"structured_outputs": {"type": "null"}}},
    },
)
"""Rules between the fields of `ResponsesBody`, for readers of its schema."""


class ResponsesBody(SamplingBody):
    """``POST /v1/responses``."""

    model_config = ConfigDict(json_schema_extra={"allOf": list(RULES)})
    examples: ClassVar[Examples] = {
        "question": {"input": "My order is late.", "max_output_tokens": 8},
        "stream": {"input": "Hello", "max_output_tokens": 4, "stream": True},
        "turns": {
            "instructions": "Be brief.",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
            "max_output_tokens": 4,
            "temperature": 0,
        },
    }

    input: Annotated[Input, Noun("messages", also=("prompt",), taken=False)]
    instructions: str | None = None
    max_output_tokens: Annotated[
        Annotated[int, Field(json_schema_extra={"minimum": 1})] | None, Noun("max_tokens")
    ] = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Accepted: it bounds the calls of hosted tools, and there are none."""
    tools: Made[Tools | None] = None
    tool_choice: Annotated[
        ToolChoice | None, PlainValidator(_choice, json_schema_input_type=ToolChoiceInput)
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: tuple[Includable, ...] | None = None
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, Noun("logprobs", taken=False)
    ] = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = None
    stream_options: StreamingOptions | None = None
    metadata: Metadata | None = None
    client_metadata: dict[str, Any] | None = None
    """Accepted: Codex says here which session it is."""
    chat_template_kwargs: Variables | None = None
    """vLLM's: variables of the chat template beside the usual ones."""

    background: Annotated[
        None,
        unserved("Background answers are not supported: wait for the answer, or stream it.", (None, False)),
    ] = None
    previous_response_id: Annotated[None, unserved(NOTHING_STORED)] = None
    conversation: Annotated[None, unserved(NOTHING_STORED)] = None
    prompt: Annotated[None, unserved("Prompts are not stored: send instructions and input.")] = None
    context_management: Annotated[None, unserved("Remove from input the items that are no longer needed.")] = (
        None
    )
    background_options: None = None
    messages: Annotated[None, unserved("Use input.")] = None
    max_tokens: Annotated[None, unserved("Use max_output_tokens.")] = None
    max_completion_tokens: Annotated[None, unserved("Use max_output_tokens.")] = None
    response_format: Annotated[None, unserved("Use text.format.")] = None
    reasoning_effort: Annotated[None, unserved("Use reasoning.effort.")] = None
    n: Annotated[None, unserved("There is one answer.", (None, 1))] = None
    moderation: None = None
    image: None = None
    access_programs: None = None

    @property
    def logprobs(self) -> int | None:
        """Return the number of log probabilities beside each token's own; None: not even that."""
        return self.top_logprobs or 0 if self.top_logprobs or LOGPROBS in (self.include or ()) else None

    @property
    def carries(self) -> bool:
        """True when reasoning is also sent in a form that clients give back unread."""
        return CARRIED in (self.include or ())
