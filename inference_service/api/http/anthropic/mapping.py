"""The map from Anthropic's bodies to conversations, and from contents of blocks to their turns."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Final

from inference_service.api.chat.request import (
    DEFAULT_TEMPERATURE,
    NO_HEADERS,
    SWITCHES,
    Call,
    ChatRequest,
    ChatTool,
    NamedTool,
    ToolChoice,
    Turn,
    check_demand,
    check_tools,
    listed_tools,
    schema_constraint,
    with_effort,
)
from inference_service.api.http.anthropic import schema
from inference_service.api.http.anthropic.schema import (
    BLOCKS_OF,
    CustomTool,
    MessagesBody,
    OutputFormat,
    PromptBody,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from inference_service.api.http.wire.body import names, request_fields
from inference_service.api.requests.bounds import refused
from inference_service.core.request import Request, hinted

BILLING: Final = "x-anthropic-billing-header:"
"""Begins a line that Claude Code sends as the first block of the system prompt: it is not for the model, and
differs in every request, so that no prompt would be found in the cache."""
FAILED: Final = "Error: "
"""Begins the result of a call that failed, unless that says so itself: templates have no other place for it."""

AnyBlock = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


@dataclass(frozen=True)
class _Placed:
    """A block, who says it, and where it stands."""

    role: str
    block: AnyBlock
    place: str


def turns_of(body: PromptBody) -> list[Turn]:
    """Return the turns of a conversation, those of one role that follow each other as one; raise RequestInvalid
    for a block that its role does not have.
    """
    system = _turn("system", [block for block in body.system or () if not _is_bill(block.text)], "system")
    turns = [system] if system.content else []
    for role, placed in groupby(_placed(body), key=lambda each: each.role):
        parts = list(placed)
        turns += _assistants(parts) if role == "assistant" else _others(role, parts)
    return turns


def _is_bill(text: str) -> bool:
    return text.startswith(BILLING) and "\n" not in text.rstrip()


def _placed(body: PromptBody) -> Iterator[_Placed]:
    for index, message in enumerate(body.messages):
        for at, block in enumerate(message.content):
            place = f"messages[{index}].content[{at}]"
            if block.type not in BLOCKS_OF[message.role]:
                one_of = (
                    f"a block of type {' or '.join(BLOCKS_OF[message.role])}, in a turn of the {message.role}"
                )
                raise refused(place, one_of, block.type)
            yield _Placed(message.role, block, place)
        if not message.content:
            yield _Placed(message.role, TextBlock(type="text", text=""), f"messages[{index}].content")


def _others(role: str, placed: list[_Placed]) -> Iterator[Turn]:
    """Yield what users, or the system, say; each result of a call is a message of its own."""
    for is_result, run in groupby(placed, key=lambda each: isinstance(each.block, ToolResultBlock)):
        if is_result:
            yield from (_result(each) for each in run)
        else:
            parts = list(run)
            yield _turn(role, [each.block for each in parts], parts[0].place)


def _turn(role: str, blocks: list[Any], place: str) -> Turn:
    return Turn(role, _joined(blocks), place=place)


def _joined(blocks: list[Any]) -> str:
    """Return the text of blocks as those of a chat are joined."""
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _result(placed: _Placed) -> Turn:
    block = placed.block
    assert isinstance(block, ToolResultBlock)  # noqa: S101 - grouped so
    text = _joined(list(block.content or ()))
    if block.is_error and not text.lower().startswith("error"):
        text = FAILED + text
    return Turn("tool", text, call_id=block.tool_use_id, place=placed.place)


def _assistants(placed: list[_Placed]) -> Iterator[Turn]:
    blocks = [each.block for each in placed]
    calls = tuple(_call(block) for block in blocks if isinstance(block, ToolUseBlock))
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    thought = "\n".join(thoughts) if thoughts else None
    yield Turn("assistant", _joined(blocks), thought=thought, calls=calls, place=placed[0].place)


def _call(block: ToolUseBlock) -> Call:
    return Call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))


FORMAT: Final = "output_config.format"
OLD_FORMAT: Final = "output_format"
EFFORTS: Final = {"max": "xhigh"}
"""Words that templates do not know."""
CHOICES: Final[Mapping[str, ToolChoice]] = {"auto": "auto", "any": "required", "none": "none"}


def chat_of(body: PromptBody, headers: Mapping[str, str] = NO_HEADERS) -> ChatRequest:
    """Return the conversation of a body; raise RequestInvalid for contradictions and wrong headers."""
    turns, form, choice = tuple(turns_of(body)), _format(body), _choice(body.tool_choice)
    last = turns[-1]
    goes_on = last.role == "assistant"
    if goes_on:
        forced = choice == "required" or isinstance(choice, NamedTool)
        _check_last(body, bool(last.calls), bool(last.content), bool(form) or forced)
    tools = listed_tools(choice, (_tool(nth, tool) for nth, tool in enumerate(body.tools or ())))
    check_demand(choice, tools)
    check_tools(choice, tools, turns)
    thinks = {} if body.thinking is None else dict.fromkeys(SWITCHES, body.thinking.type != "disabled")
    return ChatRequest(
        turns,
        _rest(body, headers),
        tools,
        choice,
        parallel=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        constraint=schema_constraint(form.schema_) if form else None,
        variables=with_effort(thinks, _effort(body)),
        starts=not goes_on,
        goes_on=goes_on,
        names=partial(names, body),
    )


def _rest(body: PromptBody, headers: Mapping[str, str]) -> Request:
    own: dict[str, Any] = {"prompt": "", "usual_temperature": DEFAULT_TEMPERATURE}
    user = None
    if isinstance(body, MessagesBody):
        own["stop"] = tuple(body.stop_sequences or ())
        user = body.metadata.user_id if body.metadata else None
    return Request.of(**request_fields(body) | own | hinted(headers, sticky_key=user or "")._asdict())


def _check_last(body: PromptBody, calls: bool, says: bool, constrained: bool) -> None:
    """Check a last turn of the assistant, which the answer continues."""
    place = f"messages[{len(body.messages) - 1}]"
    if calls:
        raise refused(place, "the results of its calls after it", "a turn of the assistant that ends in calls")
    if not says:
        raise refused(place, "text, which the answer continues", "none")
    if constrained:
        expected = "a turn of the user, where the answer must be a call or keep to a schema"
        raise refused(place, expected, "one of the assistant")


def _format(body: PromptBody) -> OutputFormat | None:
    new, old = body.output_config.format if body.output_config else None, body.output_format
    if new and old and new != old:
        raise refused(OLD_FORMAT, f"the same as {FORMAT}, or one of the two", "another")
    return new or old


def _tool(index: int, tool: CustomTool) -> ChatTool:
    lines = [tool.description] if tool.description else []
    if tool.input_examples:
        lines += [
            "Examples of its input:",
            *(json.dumps(each, ensure_ascii=False) for each in tool.input_examples),
        ]
    return ChatTool(tool.name, "\n".join(lines) or None, tool.input_schema, tool.strict, f"tools[{index}]")


def _choice(choice: schema.ToolChoice | None) -> ToolChoice | None:
    if choice is None:
        return None
    return NamedTool(choice.name) if choice.name is not None else CHOICES[choice.type]


def _effort(body: PromptBody) -> str | None:
    effort = body.output_config.effort if body.output_config else None
    return EFFORTS.get(effort, effort) if effort else None
