"""Tool calls in the text of an answer: found whatever the pieces in which the text comes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from inference_service.core.sequence import FinishReason
from inference_service.openai_api.chat_choice import ChatChoice
from inference_service.openai_api.chat_schema import Tool
from inference_service.openai_api.forced_call import ForcedCall, call_constraint
from inference_service.openai_api.pieces import CallArguments, CallBegun, Piece, Reading, Said, Thought
from inference_service.openai_api.tagged_calls import END, TaggedCalls
from inference_service.serving.request import Delta, Finished

CALL = '<tool_call>\n{"name": "find", "arguments": {"q": "a } b"}}\n</tool_call>'
FORCED = '{"name": "find", "arguments": {"q": "a } \\" b{", "more": [1, {"x": []}]}}'


def _read(reading: Reading, text: str, cuts: Sequence[int]) -> tuple[str, list[list[str]]]:
    """Return the text that is said, and name and arguments of each call."""
    pieces: list[Piece] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += reading.push(text[begin:end])
    said, calls = "", []
    for piece in pieces + reading.finish():
        match piece:
            case Said():
                said += piece.text
            case CallBegun():
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            case CallArguments():
                assert piece.index == len(calls) - 1
                calls[-1][1] += piece.text
    return said, calls


def _cuts(text: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(text)), max_size=8).map(sorted)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("just words", "just words", []),
        (CALL, "", [["find", '{"q": "a } b"}']]),
        (f"First. {CALL}", "First. ", [["find", '{"q": "a } b"}']]),
        (f"{CALL}\n{CALL}\n", "", [["find", '{"q": "a } b"}']] * 2),
        (f"{CALL}\n Done.", "Done.", [["find", '{"q": "a } b"}']]),
        (CALL.removesuffix("</tool_call>"), "", [["find", '{"q": "a } b"}']]),
        ('<tool_call>{"name": "find"}</tool_call>', "", [["find", "{}"]]),
        ('<tool_call>{"name": "find", "arguments": "{}"}</tool_call>', "", [["find", "{}"]]),
        ('<tool_call>{"name": "other"}</tool_call>!', '<tool_call>{"name": "other"}</tool_call>!', []),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", []),
        ("<tool_call>{", "<tool_call>{", []),
        ("a <tool_ca", "a <tool_ca", []),
    ],
)
def test_tagged_calls_are_told_from_text(text: str, said: str, calls: list[list[str]]) -> None:
    """A block that calls an offered tool is a call, all else is text, also letter by letter."""
    assert _read(TaggedCalls({"find"}), text, []) == (said, calls)
    assert _read(TaggedCalls({"find"}), text, range(1, len(text))) == (said, calls)


@given(_cuts(f"Hm <b> {CALL}\n{CALL} yes <too"))
def test_cuts_do_not_change_what_is_read(cuts: list[int]) -> None:
    """Wherever the text is cut, the same is said and the same is called."""
    text = f"Hm <b> {CALL}\n{CALL} yes <too"
    assert _read(TaggedCalls({"find"}), text, cuts) == ("Hm <b> yes <too", [["find", '{"q": "a } b"}']] * 2)


@given(_cuts(FORCED))
def test_a_forced_call_is_read_as_it_comes(cuts: list[int]) -> None:
    """Wherever the text is cut, name and arguments are whole, and no more than that."""
    [[name, arguments]] = _read(ForcedCall(), FORCED, cuts)[1]
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


@pytest.mark.parametrize("stop_text", [END, "X"])
def test_only_stops_of_the_client_are_told(stop_text: str) -> None:
    """The end of a call, at which an answer with one call stops, is no text that anybody asked for."""
    choice, reading = ChatChoice(0, ["X"], None, ids=False), TaggedCalls({"find"})
    choice.take(Delta(cut := CALL.removesuffix(END), ()), reading.push(cut))
    choice.end(Finished(FinishReason.STOP, stop_text, 1, 0, 1), reading.finish())
    told = choice.whole()
    assert told["finish_reason"] == "tool_calls"
    assert told["stop_reason"] == (None if stop_text == END else "X")


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
