"""Responses as chats: items become turns, and the parsed answer becomes items."""

import json
from dataclasses import replace
from typing import Any

import pytest

from inference_service.api.chat.request import ChatRequest, TextPiece, Thought
from inference_service.api.http.openai import mapping as openai
from inference_service.api.http.openai.chat_schema import ChatBody
from inference_service.api.http.responses.items import carried, uncarried
from inference_service.api.http.responses.mapping import chat_of
from inference_service.api.http.responses.output import OutputItems
from inference_service.api.http.responses.schema import ResponsesBody
from inference_service.core.sequence import Token
from tests.support.cases import cases


def _chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "input": "Hi"} | fields
    return chat_of(ResponsesBody.model_validate_json(json.dumps(body)))


def _turns(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(turn.message()) for turn in _chat(input=items).turns]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("items", "turns"),
    cases(__file__, "test_items_of_a_turn_are_one_message")
)  # fmt: skip
def test_items_of_a_turn_are_one_message(items: list[dict[str, Any]], turns: list[dict[str, Any]]) -> None:
    """The assistant's reasoning, text and calls until the next role are one message, in any order."""
    assert _turns(items) == turns


@pytest.mark.parametrize(("here", "there"), cases(__file__, "test_a_response_is_a_chat"))
def test_a_response_is_a_chat(here: dict[str, Any], there: dict[str, Any]) -> None:
    """A response and a chat make the same request to the engine."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | there
    query, chat = _chat(**here), openai.chat_of(ChatBody.model_validate_json(json.dumps(body)))
    assert replace(query.request(), id="") == replace(chat.request(), id="")
    assert (query.choice, query.parallel, query.constraint) == (chat.choice, chat.parallel, chat.constraint)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_reported_with_the_others(mode: str) -> None:
    """The prompt has all tools, so that it is found in the cache; only some may be called."""
    tools = [{"type": "function", "name": name} for name in ("f", "g")]
    here = _chat(tools=tools, tool_choice={"type": "allowed_tools", "mode": mode, "tools": tools[1:]})
    nested = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": nested[1:]}}
    body = {"model": "m", "messages": [USER], "tools": nested, "tool_choice": choice}
    for chat in (here, openai.chat_of(ChatBody.model_validate_json(json.dumps(body)))):
        assert [tool["function"]["name"] for tool in chat.request().prompt.tools] == ["f", "g"]
        assert [tool.name for tool in chat.callable_tools] == ["g"]
        assert chat.forced == (mode == "required")
        assert chat.request().output.constraint is None  # it is made when the model is known, of callable tools


@pytest.mark.parametrize(("where", "here"), cases(__file__, "test_faults_name_the_fields_of_the_body"))
def test_faults_name_the_fields_of_the_body(where: str, here: str) -> None:
    """A fault of a response does not name messages, which its client never wrote."""
    tool = {"type": "function", "name": "f"}
    tools = [tool, {"type": "namespace", "name": "n", "description": "d", "tools": [tool, tool]}]
    assert _chat(tools=tools).place(where) == here


def test_reasoning_is_carried_on_request() -> None:
    """The tokens of reasoning are counted either way."""
    for carries in (False, True):
        output = OutputItems(None, (), carries=carries)
        output.take([Thought("a")], [Token(5)] * 3)
        output.take([TextPiece("b")], [Token(5)] * 2)
        [thought, _] = output.items()
        assert (output.reasoning_tokens, "encrypted_content" in thought) == (3, carries)


def test_reasoning_that_was_carried_is_read_and_nothing_else() -> None:
    """Reasoning that another server encrypted is refused, whatever its form."""
    assert uncarried(carried("Hm é")) == "Hm é"
    for foreign in ("gAAAAA", "loramux:", "loramux:!", "loramux:/w==", carried("Hm")[:-2]):
        assert not uncarried(foreign)
