"""The map from the bodies of responses to conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inference_service.chat.request import (
    NO_HEADERS,
    SWITCHES,
    ChatRequest,
    Turn,
    check_demand,
    check_tools,
    schema_constraint,
    with_effort,
)
from inference_service.core.constraint import Constraint
from inference_service.http.openai.mapping import one_constraint, request_of
from inference_service.http.responses.items import CompactionItem, Item, OutputItem
from inference_service.http.responses.schema import CompactBody, ResponsesBody, TextFormat
from inference_service.http.responses.tools import functions_of
from inference_service.http.responses.turns import turns_of
from inference_service.http.wire.body import in_words_of, names
from inference_service.serving.bounds import refused


def chat_of(body: ResponsesBody, headers: Mapping[str, str] = NO_HEADERS) -> ChatRequest:
    """Return the conversation that a body asks to continue.

    Raises:
        RequestInvalid: fields contradict each other, an output is that of no call, reasoning or a compaction is
            not ours, or a header is wrong.
    """
    with in_words_of(body):
        turns = _turns(body)
        choice = body.tool_choice
        tools = () if choice == "none" else tuple(each.tool() for each in functions_of(body.tools))
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
            names=names(body),
        )


def chat_to_sum_up(body: CompactBody, headers: Mapping[str, str] = NO_HEADERS) -> ChatRequest:
    """Return the conversation that a body asks to sum up, of which an answer is as true as it can be.

    Raises:
        RequestInvalid: as `chat_of` does.
    """
    with in_words_of(body):
        turns = _turns(body)
        check_tools(None, (), turns)
        temperature = 0.0 if body.temperature is None else body.temperature
        return ChatRequest(
            turns,
            constraint=one_constraint(None, body.structured_outputs),
            rest=request_of(body, headers, temperature=temperature),
            variables=dict.fromkeys(SWITCHES, False),  # reasoning would be lost, and takes the room
            names=names(body),
        )


def _turns(body: ResponsesBody | CompactBody) -> tuple[Turn, ...]:
    if not isinstance(body.input, str):
        _check_calls(body.input)
    return turns_of(body.instructions, body.input)


def _check_calls(items: Sequence[Item]) -> None:
    """Refuse outputs whose calls were left out: the model would read answers to calls that it never made."""
    calls: set[str] = set()
    for index, item in enumerate(items):
        if isinstance(item, OutputItem):
            if item.call_id not in calls:
                expected = "the call_id of a function_call before it, after the last compaction"
                raise refused(f"input[{index}].call_id", expected, repr(item.call_id[:80]))
        elif isinstance(item, CompactionItem):
            calls.clear()
        else:
            calls.add(getattr(item, "call_id", ""))


def _format(form: TextFormat | None) -> Constraint | None:
    if form is None or form.type == "text":
        return None
    return Constraint("json_object") if form.schema_ is None else schema_constraint(form.schema_)
