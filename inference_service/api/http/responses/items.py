"""The tools of a response, and the items in its ``input``.

Tools are functions, alone or in namespaces. A chat knows no namespaces: to the model a function of one is
called ``NAMESPACE__NAME``, and a call of it tells both again. An item says its kind in ``type``; one with a
role and no type is a message. An answer may be given back as it is. A kind that this server cannot read is
refused by name. Sources: the types of OpenAI's client, `openai.types.responses.ResponseInputItemParam` and
`NamespaceTool`, and https://www.openresponses.org/specification
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Never, NotRequired, Self

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag, model_validator, with_config
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from inference_service.api.chat.request import ChatTool
from inference_service.api.http.openai.chat_schema import RefusalPart, text_of
from inference_service.api.http.wire.body import OPEN, Body, at_least_one, unsupported
from inference_service.api.requests.bounds import EXPECTED_NAME, NAME

ONLY_FUNCTIONS: Final = "Only functions are served, and namespaces of them."

NameOfTool = Annotated[str, Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: NameOfTool
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as a response has it."""
        return self.model_dump()


def _refuse_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str):
        raise unsupported(f"a tool of type {kind}", ONLY_FUNCTIONS)
    raise PydanticCustomError("tool", 'tools like {"type": "function", "name": "..."}')


def _kind_of_tool(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"[{kind}]" if kind in ("function", "namespace") else "[other]"


Other = Annotated[Never, PlainValidator(_refuse_tool), SkipJsonSchema(), Tag("[other]")]
AnyFunction = Annotated[
    Annotated[FunctionTool, Tag("[function]")] | Other,
    Discriminator(lambda value: kind if (kind := _kind_of_tool(value)) == "[function]" else "[other]"),
]


class NamespaceTool(Body):
    """Functions that belong together."""

    type: Literal["namespace"]
    name: NameOfTool
    description: str
    tools: tuple[AnyFunction, ...]

    @model_validator(mode="after")
    def _has_names(self) -> Self:
        """Refuse wrong names that joined ones do not show; other names are judged with the prompt."""
        if not NAME.fullmatch(self.name) or not all(tool.name for tool in self.tools):
            raise PydanticCustomError("name", "names of {expected}", {"expected": EXPECTED_NAME})
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as a response has it."""
        return self.model_dump(exclude={"tools"}) | {"tools": [tool.to_dict() for tool in self.tools]}


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("[function]")] | Annotated[NamespaceTool, Tag("[namespace]")] | Other,
    Discriminator(_kind_of_tool),
]
Tools = tuple[AnyTool, ...]


class CalledName(TypedDict):
    """The name of a function that is called, and its namespace where it has one."""

    name: str
    namespace: NotRequired[str]


@dataclass(frozen=True)
class Offered:
    """A function that the model may call, and its place in the body."""

    place: str
    """Place in the body: ``tools[1].tools[0]``."""
    function: FunctionTool
    namespace: NamespaceTool | None = None

    @property
    def name(self) -> str:
        """Return the model's name for it."""
        return qualified(self.namespace.name if self.namespace else None, self.function.name)

    def called(self) -> CalledName:
        """Return the name that a call of the function has."""
        if self.namespace is None:
            return {"name": self.function.name}
        return {"name": self.function.name, "namespace": self.namespace.name}

    def tool(self) -> ChatTool:
        """Return it as a tool of a chat."""
        descriptions = (self.namespace.description if self.namespace else "", self.function.description)
        return ChatTool(
            name=self.name,
            description="\n".join(filter(None, descriptions)) or None,
            parameters=self.function.parameters,
            strict=self.function.strict,
            place=self.place,
        )


def qualified(namespace: str | None, name: str) -> str:
    """Return what the model calls a function of a namespace, or of none."""
    return f"{namespace}__{name}" if namespace else name


def functions_of(tools: Iterable[AnyTool] | None) -> Iterator[Offered]:
    """Yield the functions of tools."""
    for index, tool in enumerate(tools or ()):
        place = f"tools[{index}]"
        if isinstance(tool, FunctionTool):
            yield Offered(place, tool)
        else:
            for nth, function in enumerate(tool.tools):
                yield Offered(f"{place}.tools[{nth}]", function, tool)


PREFIX: Final = "loramux:"


def carried(text: str) -> str:
    """Return a text as an ``encrypted_content``: reasoning, or the summary of a conversation.

    Agents that keep no state on a server ask for ``reasoning.encrypted_content`` and send it with the next
    turn, while they drop the text itself. It is no secret here: this is the text in base64.
    """
    return PREFIX + base64.b64encode(text.encode(errors="replace")).decode()


def uncarried(content: str) -> str | None:
    """Return the text that an ``encrypted_content`` carries; None where it is not ours. Empty: nothing."""
    if not content:
        return ""
    if not content.startswith(PREFIX):
        return None
    try:
        return base64.b64decode(content.removeprefix(PREFIX), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


TEXT_FIELDS: Final = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Parts that hold text, and their key for it."""
THOUGHT: Final = {"reasoning_text": "text"}
SUMMED_UP: Final = {"summary_text": "text"}
SERVED: Final = "Messages, calls, their outputs and reasoning are served."
NOTHING_STORED: Final = "Responses are not stored: send the earlier items in input."
Status = Literal["in_progress", "completed", "incomplete"] | None


def _joined(kinds: Mapping[str, str]) -> Callable[[Any], Any]:
    def joined(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return "\n".join(text_of(part, kinds) for part in content)

    return joined


@with_config(OPEN)
class InputPart(TypedDict):
    """Text of a message, or of a call's result."""

    type: Literal["input_text", "output_text", "text"]
    text: str


@with_config(OPEN)
class ReasoningPart(TypedDict):
    """Text of reasoning."""

    type: Literal["reasoning_text"]
    text: str


@with_config(OPEN)
class SummaryPart(TypedDict):
    """Text of a summary of reasoning."""

    type: Literal["summary_text"]
    text: str


Text = Annotated[
    str, BeforeValidator(_joined(TEXT_FIELDS), json_schema_input_type=str | list[InputPart | RefusalPart])
]


def _parts(kinds: Mapping[str, str], part: Any) -> BeforeValidator:
    return BeforeValidator(_joined(kinds), json_schema_input_type=str | list[part] | None)


class MessageItem(Body):
    """A turn of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    id: str | None = None
    status: Status = None
    phase: str | None = None


class CallItem(Body):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: str
    """A JSON object, as the model wrote it."""
    namespace: str | None = None
    id: str | None = None
    status: Status = None


class OutputItem(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Text
    name: str | None = None
    namespace: str | None = None
    """Accepted: the call has both."""
    id: str | None = None
    status: Status = None


class ReasoningItem(Body):
    """Earlier reasoning of the model."""

    type: Literal["reasoning"]
    id: str | None = None
    content: Annotated[str | None, _parts(THOUGHT, ReasoningPart)] = None
    summary: Annotated[str | None, _parts(SUMMED_UP, SummaryPart)] = None
    encrypted_content: str | None = None
    """Reasoning that this server carried to a client: see `carried`."""
    status: Status = None


def _refuse(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "item_reference":
        raise unsupported("an item_reference", NOTHING_STORED)
    if isinstance(kind, str):
        raise unsupported(f"an item of type {kind}", SERVED)
    raise PydanticCustomError("item", 'items like {"role": "user", "content": "..."}')


def _kind(value: Any) -> str:
    """Return the tag of an item's kind; tags in brackets are left out of the places that errors name."""
    kind = None
    if isinstance(value, dict):
        kind = value.get("type") or ("message" if "role" in value else None)
    return f"[{kind}]" if kind in KINDS else "[other]"


KINDS: Final = ("message", "function_call", "function_call_output", "reasoning")
Item = MessageItem | CallItem | OutputItem | ReasoningItem
AnyItem = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[CallItem, Tag("[function_call]")]
    | Annotated[OutputItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")]
    | Annotated[Never, PlainValidator(_refuse), SkipJsonSchema(), Tag("[other]")],
    Discriminator(_kind),
]


Items = Annotated[tuple[AnyItem, ...], at_least_one("input", "item"), Field(json_schema_extra={"minItems": 1})]
Input = Annotated[
    Annotated[str, Tag("[text]")] | Annotated[Items, Tag("[items]")],
    Discriminator(lambda value: "[text]" if isinstance(value, str) else "[items]"),
]
