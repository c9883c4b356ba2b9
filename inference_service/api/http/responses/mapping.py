"""The map from the bodies of responses to conversations, and from items to their turns.

The assistant's part of one turn comes in several items, and is one message: reasoning, text and calls.
So are the instructions and the messages of systems and developers before all others: templates know one system
message.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Final

from inference_service.api.chat.request import (
    NO_HEADERS,
    Call,
    ChatRequest,
    Turn,
    check_demand,
    check_tools,
    listed_tools,
    schema_constraint,
    with_effort,
)
from inference_service.api.http.openai.mapping import one_constraint, request_of
from inference_service.api.http.responses.items import (
    CallItem,
    Item,
    MessageItem,
    OutputItem,
    ReasoningItem,
    functions_of,
    qualified,
    uncarried,
)
from inference_service.api.http.responses.schema import ResponsesBody, TextFormat
from inference_service.api.http.wire.body import in_words_of, names
from inference_service.api.requests.bounds import refused
from inference_service.core.constraint import Constraint

SYSTEM: Final = ("system", "developer")
PLACE: Final = "input"
"""Place of every turn: clients sent items, and several can be one turn."""


def turns_of(instructions: str | None, items: str | Sequence[Item]) -> tuple[Turn, ...]:
    """Return the turns of a text, or of items, behind the instructions; raise RequestInvalid for an output of
    no call, and for reasoning of other servers.
    """
    if not isinstance(items, str):
        _check_calls(items)
    turns = [Turn("user", items, place=PLACE)] if isinstance(items, str) else [*_turns(items)]
    before = [*takewhile(lambda turn: turn.role in SYSTEM, turns)]
    texts = [text for text in (instructions, *(turn.content for turn in before)) if text is not None]
    system = [Turn("system", "\n\n".join(texts), place=PLACE)] if texts else []
    return (*system, *turns[len(before) :])


@dataclass
class _AssistantTurn:
    """The assistant's part of one turn, as far as it was read."""

    thought: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """True when more text or reasoning belongs to another turn; behind a call it belongs to this one."""
        return bool(self.texts) and not self.calls

    def turn(self) -> Iterator[Turn]:
        """Yield the turn; none where nothing was done."""
        if self.thought or self.texts or self.calls:
            yield Turn(
                "assistant",
                "\n".join(self.texts),
                thought="\n".join(self.thought) if self.thought else None,
                calls=tuple(self.calls),
                place=PLACE,
            )


def _turns(items: Sequence[Item]) -> Iterator[Turn]:
    answer = _AssistantTurn()
    for index, item in enumerate(items):
        theirs = isinstance(item, OutputItem) or (isinstance(item, MessageItem) and item.role != "assistant")
        if theirs or (answer.is_whole and not isinstance(item, CallItem)):
            yield from answer.turn()
            answer = _AssistantTurn()
        match item:
            case OutputItem():
                yield Turn("tool", item.output, call_id=item.call_id, place=PLACE)
            case MessageItem() if theirs:
                yield Turn(item.role, item.content, place=PLACE)
            case MessageItem():
                answer.texts.append(item.content)
            case CallItem():
                answer.calls.append(Call(item.call_id, qualified(item.namespace, item.name), item.arguments))
            case ReasoningItem():
                answer.thought += _thought(item, index)
    yield from answer.turn()


def _thought(item: ReasoningItem, index: int) -> list[str]:
    """Return what was thought: the text itself, else what was carried, else its summary."""
    carried = None if item.encrypted_content is None else _uncarried(item.encrypted_content, index)
    thought = next((text for text in (item.content, carried, item.summary) if text), None)
    return [] if thought is None else [thought]


def _uncarried(content: str, index: int) -> str:
    text = uncarried(content)
    if text is None:
        raise refused(
            f"input[{index}].encrypted_content",
            "a text that this server returned; leave out items of other servers",
            "another text",
        )
    return text


def chat_of(body: ResponsesBody, headers: Mapping[str, str] = NO_HEADERS) -> ChatRequest:
    """Return the conversation that a body asks to continue.

    Raises:
        RequestInvalid: fields contradict each other, an output is that of no call, reasoning is not ours, or a
            header is wrong.
    """
    with in_words_of(body):
        turns = turns_of(body.instructions, body.input)
        choice = body.tool_choice
        tools = listed_tools(choice, (each.tool() for each in functions_of(body.tools)))
        check_demand(choice, tools)
        check_tools(choice, tools, turns)
        constraint = one_constraint(_format(body.text.format if body.text else None), body.structured_outputs)
        effort = body.reasoning.effort if body.reasoning else None
        return ChatRequest(
            turns,
            request_of(body, headers, logprobs=body.logprobs),
            tools,
            choice,
            parallel=body.parallel_tool_calls is not False,
            constraint=constraint,
            variables=with_effort(body.chat_template_kwargs, effort),
            names=partial(names, body),
        )


def _check_calls(items: Sequence[Item]) -> None:
    """Refuse outputs whose calls were left out: the model would read answers to calls that it never made."""
    calls: set[str] = set()
    for index, item in enumerate(items):
        if isinstance(item, OutputItem):
            if item.call_id not in calls:
                expected = "the call_id of a function_call before it"
                raise refused(f"input[{index}].call_id", expected, repr(item.call_id[:80]))
        else:
            calls.add(getattr(item, "call_id", ""))


def _format(form: TextFormat | None) -> Constraint | None:
    if form is None or form.type == "text":
        return None
    return Constraint("json_object") if form.schema_ is None else schema_constraint(form.schema_)
