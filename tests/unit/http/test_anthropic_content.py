"""Blocks of an answer: the events of a stream add up to the answer without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from inference_service.chat.pieces import CallArguments, CallBegun, Piece, TextPiece, Thought
from inference_service.http.anthropic.messages import Content, input_of, signature_of

PIECES: list[Piece] = [
    Thought("I "),
    Thought("look."),
    TextPiece("\n\n"),
    TextPiece("The "),
    TextPiece("sky."),
    TextPiece(" "),
    CallBegun(0, "c0", "look"),
    CallArguments(0, '{"at": '),
    CallArguments(0, '"sky"}'),
    TextPiece("\n"),
    CallBegun(1, "c1", "wait"),
    CallArguments(1, "{}"),
    TextPiece(" "),
]


def blocks_of(pieces: Sequence[Piece], *, shows_thinking: bool = True) -> tuple[list[Any], list[Any]]:
    """Return the events of pieces that come one by one, and the blocks at the end."""
    content = Content(shows_thinking=shows_thinking)
    events = [event for piece in pieces for event in content.take([piece])]
    return events + content.end(), content.blocks


def added_up(events: Sequence[Any]) -> list[Any]:
    """Return the blocks that a client makes of events, which must open and close one block after the other."""
    blocks: list[Any] = []
    arguments, opened = "", False
    for event in events:
        assert event["index"] == len(blocks) - (event["type"] != "content_block_start")
        match event["type"]:
            case "content_block_start":
                assert not opened
                opened, arguments = True, ""
                blocks.append(dict(event["content_block"]))
            case "content_block_stop":
                opened = False
                if blocks[-1]["type"] == "tool_use":
                    blocks[-1]["input"] = input_of(arguments)
            case "content_block_delta":
                delta = dict(event["delta"])
                kind = delta.pop("type")
                [(name, value)] = delta.items()
                assert kind == {"partial_json": "input_json"}.get(name, name) + "_delta"
                if name == "partial_json":
                    arguments += value
                else:
                    blocks[-1][name] += value
    assert not opened
    return blocks


def test_blocks_are_of_one_kind_each() -> None:
    """Thinking, text and calls; spaces alone are no text, and those before one are a part of it."""
    events, blocks = blocks_of(PIECES)
    assert blocks == [
        {"type": "thinking", "thinking": "I look.", "signature": signature_of("I look.")},
        {"type": "text", "text": "\n\nThe sky. "},
        {"type": "tool_use", "id": "c0", "name": "look", "input": {"at": "sky"}},
        {"type": "tool_use", "id": "c1", "name": "wait", "input": {}},
    ]
    assert added_up(events) == blocks


def test_a_stream_adds_up_at_any_end() -> None:
    """A stream adds up at any end, also within a call."""
    for size in range(len(PIECES) + 1):
        events, blocks = blocks_of(PIECES[:size])
        assert added_up(events) == blocks
    assert blocks_of(PIECES[:8])[1][-1]["input"] == {}
    assert blocks_of([TextPiece(" "), TextPiece("\n")]) == ([], [])


def test_thinking_may_be_left_out() -> None:
    """Hidden thinking is a block with a signature and without text."""
    events, [thinking, *_] = blocks_of(PIECES, shows_thinking=False)
    assert thinking == {"type": "thinking", "thinking": "", "signature": signature_of("I look.")}
    assert added_up(events)[0] == thinking


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("", {}),
        ('{"a": [1, {"b": "c"}]}', {"a": [1, {"b": "c"}]}),
        ('{"a": 1, "b": "unfin', {"a": 1}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ("look there", {"INVALID_JSON": "look there"}),
    ],
)
def test_inputs_are_objects(arguments: str, found: dict[str, Any]) -> None:
    """Inputs are objects, for any text of the model."""
    assert input_of(arguments) == found
