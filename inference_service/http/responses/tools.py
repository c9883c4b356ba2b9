"""The tools of a response: functions, alone or in namespaces.

A chat knows no namespaces: to the model a function of one is called ``NAMESPACE__NAME``, and a call of it tells
both again.
Source: `openai.types.responses.NamespaceTool`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Never, NotRequired

from pydantic import Discriminator, PlainValidator, Tag
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from inference_service.chat.request import ChatTool
from inference_service.http.wire.body import Body, unsupported

ONLY_FUNCTIONS: Final = "Only functions are served, and namespaces of them."


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as a response has it."""
        return self.model_dump()


def _refuse(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str):
        raise unsupported(f"a tool of type {kind}", ONLY_FUNCTIONS)
    raise PydanticCustomError("tool", 'tools like {"type": "function", "name": "..."}')


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"[{kind}]" if kind in ("function", "namespace") else "[other]"


Other = Annotated[Never, PlainValidator(_refuse), SkipJsonSchema(), Tag("[other]")]
AnyFunction = Annotated[
    Annotated[FunctionTool, Tag("[function]")] | Other,
    Discriminator(lambda value: kind if (kind := _kind(value)) == "[function]" else "[other]"),
]


class NamespaceTool(Body):
    """Functions that belong together."""

    type: Literal["namespace"]
    name: str
    description: str
    tools: tuple[AnyFunction, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as a response has it."""
        return self.model_dump(exclude={"tools"}) | {"tools": [tool.to_dict() for tool in self.tools]}


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("[function]")] | Annotated[NamespaceTool, Tag("[namespace]")] | Other,
    Discriminator(_kind),
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
