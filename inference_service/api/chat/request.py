"""A conversation, whatever API it came through: turns, tools, what is wanted, and the pieces of its answers."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

from inference_service.api.requests.bounds import check_texts, check_turns, refused, role_of, thought_of
from inference_service.core.constraint import Constraint
from inference_service.core.request import Message, Request
from loramux_shared.faults import Fault
from loramux_shared.untrusted_json import JsonInvalid, parse_json

SWITCHES: Final = ("enable_thinking", "thinking")
"""Variables with which templates turn thinking on and off: of Qwen, SmolLM and Gemma; of Granite."""
DEFAULT_TEMPERATURE: Final = 1.0
"""Default of all chat APIs; an adapter's own comes before it."""
NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
ANY_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object"}
_TURN: Final = re.compile(r"messages\[(\d+)\]")
_TOOL: Final = re.compile(r"tools\[(\d+)\]\.function\b")


@dataclass(frozen=True)
class Call:
    """A call that the assistant made earlier."""

    id: str
    name: str
    arguments: str
    """A JSON object, as the model wrote it."""


@dataclass(frozen=True)
class Turn:
    """One side's message."""

    role: str
    content: str = ""
    name: str | None = None
    call_id: str | None = None
    """Id of the call whose result this is."""
    thought: str | None = None
    """Reasoning of the assistant."""
    calls: tuple[Call, ...] = ()
    place: str = ""
    """Place in the client's body; empty: ``messages[INDEX]``, with the field below it."""

    def message(self) -> Message:
        """Return it as chat templates know it."""
        made: dict[str, Any] = {"role": role_of(self.role), "content": self.content}
        if self.name is not None:
            made["name"] = self.name
        if self.call_id is not None:
            made["tool_call_id"] = self.call_id
        if self.thought is not None:
            made |= thought_of(self.thought)
        if self.calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _arguments(call.arguments)},
                }
                for call in self.calls
            ]
        return made


@dataclass(frozen=True)
class ChatTool:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """A JSON schema; None: any arguments."""
    strict: bool | None = None
    """Optional calls keep to the schema, too; required calls always do."""
    place: str = ""
    """Place in the client's body; empty: ``tools[INDEX].function``."""

    def rendered(self) -> Mapping[str, Any]:
        """Return it as chat templates know it."""
        stated = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }
        return {
            "type": "function",
            "function": {name: value for name, value in stated.items() if value is not None},
        }


@dataclass(frozen=True)
class NamedTool:
    """A choice that is a function: the model must call it."""

    name: str


@dataclass(frozen=True)
class AllowedTools:
    """A choice of some of the tools: the prompt lists all, and the model may call these."""

    mode: Literal["auto", "required"]
    """Whether a call is optional or required."""
    names: tuple[str, ...]


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


@dataclass(frozen=True)
class ChatRequest:
    """A conversation, and what its answers are to be."""

    turns: tuple[Turn, ...]
    rest: Request
    """Request without the conversation: the model, sampling and output options. Its prompt is empty."""
    tools: tuple[ChatTool, ...] = ()
    """The tools that the prompt lists."""
    choice: ToolChoice | None = None
    """None: auto."""
    parallel: bool = True
    """True if an answer may make several calls."""
    constraint: Constraint | None = None
    """Constraint of the answer's text, where it is no call."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, beside the usual ones."""
    starts: bool = True
    """The prompt ends with the beginning of the assistant's turn."""
    goes_on: bool = False
    """The answer continues with the last turn."""
    shows_thoughts: bool = True
    names: Callable[[], Mapping[str, str]] = dict
    """Returns the client's names of fields of requests, where it has other names for them."""

    @property
    def forced(self) -> bool:
        """True when the answer must be a call."""
        return _is_forced(self.choice)

    @property
    def callable_tools(self) -> tuple[ChatTool, ...]:
        """The tools that the answer may call; where it must call one, that is one of these."""
        return _callable(self.choice, self.tools)

    @property
    def one_call(self) -> bool:
        """True when the answer may make one call at most."""
        return bool(self.callable_tools) and (not self.parallel or isinstance(self.choice, NamedTool))

    def request(self) -> Request:
        """Return what the service is asked."""
        prompt = replace(
            self.rest.prompt,
            content=[turn.message() for turn in self.turns],
            tools=tuple(tool.rendered() for tool in self.tools),
            chat_template_kwargs=self.variables,
            add_generation_prompt=self.starts,
            continue_final_message=self.goes_on,
        )
        if self.constraint is None or self.forced:
            return replace(self.rest, prompt=prompt)
        return replace(self.rest, prompt=prompt, output=replace(self.rest.output, constraint=self.constraint))

    def place(self, where: str) -> str:
        """Return what the client calls a field of the request, or a part of it."""
        turn = _TURN.match(where)
        if turn and int(turn[1]) < len(self.turns):
            return self.turns[int(turn[1])].place or where
        if where == "continue_final_message" and self.turns:
            return self.turns[-1].place or where
        where = _place_of_tool(self.tools, where)
        return self.names().get(where, where)


def _is_forced(choice: ToolChoice | None) -> bool:
    return choice == "required" or isinstance(choice, NamedTool) or getattr(choice, "mode", "") == "required"


def _callable(choice: ToolChoice | None, tools: Sequence[ChatTool]) -> tuple[ChatTool, ...]:
    match choice:
        case AllowedTools(_, names):
            return tuple(tool for tool in tools if tool.name in names)
        case NamedTool(name):
            return tuple(tool for tool in tools if tool.name == name)
    return tuple(tools)


@contextmanager
def naming(place: Callable[[str], str]) -> Iterator[None]:
    """Name fields in the faults of a block as the client does."""
    try:
        yield
    except Fault as fault:
        findings = [each.model_copy(update={"where": place(each.where)}) for each in fault.findings]
        raise type(fault)(fault.message, findings, fault.repository, fault.retry_after_s) from fault


def check_tools(choice: ToolChoice | None, tools: Sequence[ChatTool], turns: Sequence[Turn]) -> None:
    """Look at the choice among tools, and at the calls that were made earlier; raise RequestInvalid for an
    allowed tool that is not there, and for arguments with too much in them.
    """
    names = {tool.name for tool in tools}
    for name in choice.names if isinstance(choice, AllowedTools) else ():
        if name not in names:
            raise refused("tool_choice", "names of tools in tools", name)
    check_calls(turns)


def listed_tools(choice: ToolChoice | None, tools: Iterable[ChatTool]) -> tuple[ChatTool, ...]:
    """Return the tools that the prompt lists: none where the choice is none.

    Raise RequestInvalid where tools that it does not list break a rule; the others are judged with the prompt.
    """
    known = tuple(tools)
    if choice != "none":
        return known
    with naming(partial(_place_of_tool, known)):
        check_turns((), [tool.rendered() for tool in known], {}, goes_on=False, starts=False)
    return ()


def _place_of_tool(tools: Sequence[ChatTool], where: str) -> str:
    """Return what the client calls a part of a tool; another field as it is."""
    found = _TOOL.match(where)
    place = tools[int(found[1])].place if found and int(found[1]) < len(tools) else ""
    return place + where[found.end() :] if found and place else where


def check_calls(turns: Sequence[Turn]) -> None:
    """Raise RequestInvalid for calls that were made earlier and have too much in their arguments."""
    check_texts(call.arguments for turn in turns for call in turn.calls)


def check_demand(choice: ToolChoice | None, tools: Sequence[ChatTool]) -> None:
    """Raise RequestInvalid for a demanded call where no tool can be called, or not the named one."""
    if not _is_forced(choice) or _callable(choice, tools):
        return
    if isinstance(choice, NamedTool) and tools:
        raise refused("tool_choice", "the name of a tool in tools", choice.name)
    raise refused("tool_choice", "auto or none, where there are no tools", getattr(choice, "name", choice))


def schema_constraint(schema: Mapping[str, Any]) -> Constraint:
    """Return the constraint to texts that a JSON schema describes."""
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))


def with_effort(variables: Mapping[str, Any] | None, effort: str | None) -> Mapping[str, Any]:
    """Return variables of a chat template that also say how long to think.

    Templates switch thinking off with other names than OpenAI's, and those that know none of them tell nobody.
    Raise RequestInvalid where both say it, and not the same.
    """
    variables = variables or {}
    if effort is None:
        return variables
    if variables.get("reasoning_effort", effort) != effort:
        raise refused("reasoning_effort", "the same as chat_template_kwargs has, or one of the two", effort)
    off = dict.fromkeys(SWITCHES, False) if effort == "none" else {}
    return off | dict(variables) | {"reasoning_effort": effort}


def _arguments(text: str) -> Any:
    """Return the arguments as an object, which templates write as JSON; text that is none stays text."""
    try:
        arguments = parse_json(text)
    except JsonInvalid:
        return text
    return arguments if isinstance(arguments, dict) else text


@dataclass(slots=True)
class TextPiece:
    """Text for the user."""

    text: str


@dataclass(slots=True)
class Thought:
    """Reasoning, apart from the text for the user."""

    text: str


@dataclass(slots=True)
class CallBegun:
    """A call of a tool begins."""

    index: int
    """0 for the first call of the answer."""
    id: str
    name: str


@dataclass(slots=True)
class CallArguments:
    """More of the arguments of a call, as JSON text."""

    index: int
    text: str


Piece = TextPiece | Thought | CallBegun | CallArguments


class Plain:
    """An answer without tools: all of it is said."""

    def push(self, text: str) -> list[Piece]:
        """Return the text."""
        return [TextPiece(text)] if text else []

    def finish(self) -> list[Piece]:
        """Return nothing."""
        return []


def call_id() -> str:
    """Return an id for a new call."""
    return f"call_{secrets.token_hex(12)}"


class AnswerCalls:
    """The calls of one answer so far: numbered, with ids, and only of tools that were offered."""

    def __init__(self, offered: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str] = call_id) -> None:
        """Count the calls of these tools, by name with the JSON schemas of their arguments."""
        self.offered = offered
        self._new_id = new_id
        self._count = 0

    def begin(self, name: str) -> CallBegun:
        """Begin a call."""
        self._count += 1
        return CallBegun(self._count - 1, self._new_id(), name)

    def more(self, text: str) -> CallArguments:
        """Return more of the arguments of the last call."""
        return CallArguments(self._count - 1, text)
