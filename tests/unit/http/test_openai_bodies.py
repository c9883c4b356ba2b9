"""Bodies of OpenAI's API: accepted fields, and the faults of others."""

import json
import re
from typing import Any

import pytest

from inference_service.api.http.openai.chat_schema import ChatBody
from inference_service.api.http.openai.mapping import turns_of
from inference_service.api.http.openai.schema import CompletionBody
from inference_service.api.http.wire.body import Body
from tests.support.cases import cases
from tests.support.root import ROOT

USER = {"role": "user", "content": "Hi"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}


def test_what_changes_nothing_is_accepted() -> None:
    """Fields of OpenAI's API that do not change an answer are accepted."""
    fields = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "modalities": ["text"],
    }  # fmt: skip
    assert ChatBody.model_validate_json(json.dumps(CHAT | fields)).user == "u"


def test_messages_become_what_templates_know() -> None:
    """Parts are joined, developer is system, and arguments are objects where they are JSON."""
    sent = cases(__file__, "test_messages_become_what_templates_know")
    body = ChatBody.model_validate_json(json.dumps(CHAT | {"messages": sent}))
    system, user, assistant, tool = (turn.message() for turn in turns_of(body.messages))
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": "a\nb", "name": "Ann"}
    assert assistant["content"] == ""
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"a": 1}, "oops"]
    assert tool == {"role": "tool", "content": "42", "tool_call_id": "c1"}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_what_was_thought_comes_back_by_both_names(name: str) -> None:
    """Reasoning of an earlier turn is read by either name, and templates have it by both."""
    sent = [{"role": "assistant", name: "Hm."}]
    body = ChatBody.model_validate_json(json.dumps(CHAT | {"messages": sent}))
    [turn] = (turn.message() for turn in turns_of(body.messages))
    assert turn == {"role": "assistant", "content": "", "reasoning": "Hm.", "reasoning_content": "Hm."}


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
def test_every_parameter_is_documented(kind: type[Body]) -> None:
    """The page of the API has every field of its bodies."""
    page = (ROOT / "docs/reference/openai.md").read_text()
    missing = [name for name in kind.model_fields if not re.search(rf"`{name}\b", page)]
    assert not missing
