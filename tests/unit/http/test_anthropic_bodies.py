"""Anthropic's bodies, and blocks of its answers."""

import json
from typing import Any

import pytest

from inference_service.api.chat.request import (
    Call,
    CallArguments,
    CallBegun,
    ChatRequest,
    NamedTool,
    Piece,
    TextPiece,
    Thought,
)
from inference_service.api.http.anthropic.mapping import chat_of
from inference_service.api.http.anthropic.messages import Content, input_of, signature_of
from inference_service.api.http.anthropic.schema import CountBody, MessagesBody
from tests.support.cases import cases
from tests.support.root import ROOT

USER = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [USER]}
TOOL = {"name": "look", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "sky"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "blue"}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
CLAUDE_CODE: dict[str, Any] = cases(__file__, "CLAUDE_CODE")


def _chat(**fields: Any) -> ChatRequest:
    return chat_of(MessagesBody.model_validate_json(json.dumps(BODY | fields)))


def test_what_a_chat_refuses_is_named_in_this_apis_words() -> None:
    """A place in the chat is reported as the place in the body that it was read from."""
    chat = _chat(system="Be brief.", tools=[TOOL] * 4, messages=[USER, *CLAUDE_CODE["messages"][1:]])
    reported = cases(__file__, "test_what_a_chat_refuses_is_named_in_this_apis_words")
    assert [chat.place(where) for where in reported] == list(reported.values())


def test_a_body_of_claude_code() -> None:
    """Blocks become turns as templates know them; fields of prompt caching are accepted."""
    chat = _chat(**CLAUDE_CODE)
    assert [turn.role for turn in chat.turns] == ["system", "user", "assistant", "tool", "tool", "user"]
    system, user, assistant, result, failed, last = chat.turns
    assert system.content == "You are an agent.\nBe brief."
    assert user.content == "<system-reminder>x</system-reminder>\nList."
    assert (assistant.content, assistant.thought) == ("I look.", "I list.")
    assert assistant.calls == (Call("c1", "Bash", '{"command": "ls"}'), Call("c2", "Read", "{}"))
    assert (result.call_id, result.content) == ("c1", "a b")
    assert (failed.call_id, failed.content, last.content) == ("c2", "Error: no file", "Go on.")
    assert [tool.name for tool in chat.tools][-1] == "mcp__files__list"
    assert (chat.rest.model.sticky_key, chat.rest.sampling.max_tokens) == ("user_0_account__session_0", 32000)
    assert chat.variables == {"enable_thinking": True, "thinking": True, "reasoning_effort": "xhigh"}
    assert not chat.goes_on


def test_turns_of_one_role_are_one() -> None:
    """Messages of one role in a row are one turn; results of tools are turns of their own."""
    stated = [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}, USER, USER]
    turns = _chat(messages=[USER, USER, *stated]).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "user"]
    assert [turn.content for turn in turns] == ["Hi\nHi", "", "blue", "Hi\nHi"]


@pytest.mark.parametrize(
    ("choice", "chosen", "parallel"),
    [
        *cases(__file__, "test_tool_choices"),
        ({"type": "tool", "name": "look"}, NamedTool("look"), True),
    ],
)
def test_tool_choices(choice: Any, chosen: Any, parallel: bool) -> None:
    """A choice of tools is the chat's choice, and says whether calls may be parallel."""
    chat = _chat(tools=[TOOL], tool_choice=choice)
    assert (chat.choice, chat.parallel) == (chosen, parallel)


def test_examples_of_inputs_are_reported_with_the_description() -> None:
    """Examples of inputs are appended to the description, as templates have no place for them."""
    [tool] = _chat(tools=[TOOL | {"description": "Looks.", "input_examples": [{"at": "sky"}]}]).tools
    assert tool.description == 'Looks.\nExamples of its input:\n{"at": "sky"}'


@pytest.mark.parametrize("where", ["output_format", "output_config"])
def test_a_schema_constrains_the_answer(where: str) -> None:
    """A schema constrains the answer under its old and its new name, beside tools too."""
    fields = {where: SCHEMA if where == "output_format" else {"format": SCHEMA}}
    for choice in ({}, {"tool_choice": {"type": "none"}}):
        constraint = _chat(tools=[TOOL], **choice, **fields).constraint
        assert (constraint.kind, constraint.text) == ("json_schema", '{"type": "object"}')


def test_null_is_not_set() -> None:
    """A field that is null has its default."""
    names = set(MessagesBody.model_fields) - set(BODY)
    query = _chat(**dict.fromkeys(names)).rest
    assert query.sampling.temperature is None
    assert query.sampling.stop == ()


@pytest.mark.parametrize("kind", [MessagesBody, CountBody])
def test_every_parameter_is_documented(kind: Any) -> None:
    """The page of the API has every field of its bodies."""
    page = (ROOT / "docs/reference/anthropic.md").read_text()
    assert [name for name in kind.model_fields if f"`{name}" not in page] == []


PIECES: list[Piece] = [
    Thought("I "), Thought("look."), TextPiece("\n\n"), TextPiece("The "), TextPiece("sky."), TextPiece(" "),
    CallBegun(0, "c0", "look"), CallArguments(0, '{"at": '), CallArguments(0, '"sky"}'), TextPiece("\n"),
    CallBegun(1, "c1", "wait"), CallArguments(1, "{}"), TextPiece(" "),
]  # fmt: skip


def test_blocks_are_of_one_kind_each() -> None:
    """Thinking, text and calls; spaces alone are no text, and those before one are a part of it."""
    content = Content(shows_thinking=True)
    for piece in PIECES:
        content.take([piece])
    content.end()
    assert content.blocks == [
        {"type": "thinking", "thinking": "I look.", "signature": signature_of("I look.")},
        {"type": "text", "text": "\n\nThe sky. "},
        {"type": "tool_use", "id": "c0", "name": "look", "input": {"at": "sky"}},
        {"type": "tool_use", "id": "c1", "name": "wait", "input": {}},
    ]


@pytest.mark.parametrize(("arguments", "found"), cases(__file__, "test_inputs_are_objects"))
def test_inputs_are_objects(arguments: str, found: dict[str, Any]) -> None:
    """Arguments that are no JSON object become an input that is one."""
    assert input_of(arguments) == found
