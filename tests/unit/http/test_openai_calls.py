"""Schemas of calls that are demanded, and pieces as chats tell them."""

from __future__ import annotations

from llguidance import LLMatcher

from inference_service.chat.conversation import AnswerPart
from inference_service.chat.formats.lark import OfferedTool, calls_schema
from inference_service.chat.pieces import TextPiece, Thought
from inference_service.core.sequence import EndReason, Token
from inference_service.http.openai.answers import usage
from inference_service.http.openai.chat import ChatChoice
from inference_service.serving.request import AnswerDelta, AnswerFinished


def test_schemas_of_several_tools_keep_their_references() -> None:
    """Definitions of two tools with the same name do not meet, and the grammar library takes the whole."""
    shapes = {"a": {"type": "integer"}, "b.c": {"type": "string"}}
    properties = {"x": {"$ref": "#/$defs/X"}, "again": {"$ref": "#"}}
    tools = [
        OfferedTool(name, {"type": "object", "properties": properties, "$defs": {"X": shape}})
        for name, shape in shapes.items()
    ]
    schema = calls_schema(tools)
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema)) == ""
    definitions = schema["$defs"]
    for name, shape in shapes.items():
        assert definitions[name]["properties"]["x"] == {"$ref": f"#/$defs/{name}/$defs/X"}
        assert definitions[name]["properties"]["again"] == {"$ref": f"#/$defs/{name}"}
        assert definitions[name]["$defs"]["X"] == shape


def test_thoughts_have_both_names() -> None:
    """Reasoning stands beside the content, in a message and in chunks, under vLLM's two names."""
    choice = ChatChoice(0, [], None, ids=False)
    parts = choice.parts(
        AnswerPart(AnswerDelta("ab", ()), [Thought("Let me "), Thought("see."), TextPiece("Yes.")])
    )
    choice.take(AnswerPart(AnswerFinished(EndReason.STOP, "", 1, 3, 0), []))
    deltas = [part["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[1] == {"reasoning_content": "Let me ", "reasoning": "Let me "}
    assert deltas[3] == {"content": "Yes."}
    message = choice.whole()["message"]
    assert (message["content"], message["reasoning"]) == ("Yes.", "Let me see.")
    assert message["reasoning_content"] == message["reasoning"]


def test_tokens_of_reasoning_are_counted() -> None:
    """Those that were decoded for it; those of marks count for what comes behind them."""
    choice, tokens = ChatChoice(0, [], None, ids=False), (Token(5), Token(6))
    for pieces in ([], [Thought("a")], [TextPiece("b")], [], [Thought("c")]):
        choice.take(AnswerPart(AnswerDelta("", tokens), pieces))
    assert choice.reasoning_tokens == 8
    assert usage([], 8)["completion_tokens_details"] == {"reasoning_tokens": 8}
    assert "completion_tokens_details" not in usage([])
