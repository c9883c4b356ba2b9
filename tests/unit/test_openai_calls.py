"""A call that is demanded: its constraint, and how it is read; and pieces as chats tell them."""

from __future__ import annotations

import json

from hypothesis import given
from llguidance import LLMatcher

from inference_service.openai_api.chat_choice import ChatChoice
from inference_service.openai_api.chat_schema import Tool
from inference_service.openai_api.forced_call import ForcedCall, call_constraint
from inference_service.openai_api.pieces import CallArguments, CallBegun, Said, Thought
from inference_service.serving.request import Delta
from tests.support.readings import cuts_of, read

FORCED = '{"name": "find", "arguments": {"q": "a } \\" b{", "more": [1, {"x": []}]}}'


@given(cuts_of(FORCED))
def test_a_forced_call_is_read_as_it_comes(cuts: list[int]) -> None:
    """Wherever the text is cut, name and arguments are whole, and no more than that."""
    [[_, name, arguments]] = read(ForcedCall(), FORCED, cuts)
    assert name == "find"
    assert json.loads(arguments) == json.loads(FORCED)["arguments"]


def test_arguments_of_a_forced_call_are_not_held_back() -> None:
    """Arguments come with the text that holds them, in the middle of a string too."""
    reading = ForcedCall()
    assert reading.push('{"name": "f", "arguments"') == []
    begun, arguments = reading.push(': {"a": "b')
    assert isinstance(begun, CallBegun)
    assert arguments == CallArguments(0, '{"a": "b')
    assert reading.push('}c"') == [CallArguments(0, '}c"')]
    assert reading.push("}}") == [CallArguments(0, "}")]


def test_schemas_of_several_tools_keep_their_references() -> None:
    """Definitions of two tools with the same name do not meet, and the grammar library takes the whole."""
    shapes = {"a": {"type": "integer"}, "b.c": {"type": "string"}}
    tools = [
        Tool.model_validate(
            {
                "type": "function",
                "function": {
                    "name": name,
                    "parameters": {
                        "type": "object",
                        "properties": {"x": {"$ref": "#/$defs/X"}, "again": {"$ref": "#"}},
                        "$defs": {"X": shape},
                    },
                },
            }
        )
        for name, shape in shapes.items()
    ]
    constraint = call_constraint(tools)
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(constraint.text)) == ""
    definitions = json.loads(constraint.text)["$defs"]
    for name, shape in shapes.items():
        assert definitions[name]["properties"]["x"] == {"$ref": f"#/$defs/{name}/$defs/X"}
        assert definitions[name]["properties"]["again"] == {"$ref": f"#/$defs/{name}"}
        assert definitions[name]["$defs"]["X"] == shape


def test_thoughts_have_both_names() -> None:
    """What was thought stands beside the content, in a message and in chunks, under vLLM's two names."""
    choice = ChatChoice(0, [], None, ids=False)
    told = choice.chunks(Delta("ab", ()), [Thought("Let me "), Thought("see."), Said("Yes.")])
    deltas = [each["delta"] for each in told]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[1] == {"reasoning_content": "Let me ", "reasoning": "Let me "}
    assert deltas[3] == {"content": "Yes."}
    message = choice.whole()["message"]
    assert (message["content"], message["reasoning"]) == ("Yes.", "Let me see.")
    assert message["reasoning_content"] == message["reasoning"]
