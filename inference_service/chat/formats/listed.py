"""Calls as JSON behind one mark: of Granite 3 and Phi-4 mini.

::

    <|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]             Granite 3
    <|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>    Phi-4 mini
    functools[{"name": "weather", "arguments": {"city": "Oslo"}}]                 Phi-4 mini, too

Source: chat templates of granite-3.3-2b-instruct and Phi-4-mini-instruct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from inference_service.chat.formats import tagged
from inference_service.chat.formats.format import TemplateMarks, ToolFormat
from inference_service.chat.formats.frame import Block
from inference_service.chat.formats.json_calls import list_of_calls
from inference_service.chat.formats.lark import (
    MOST_CALLS,
    CallGrammar,
    OfferedTool,
    Spelling,
    json_of,
    list_schema,
)
from inference_service.chat.pieces import AnswerCalls
from loramux_shared.runtime import ToolParser

MARK: Final = "<|tool_call|>"
PHI_END: Final = "<|/tool_call|>"
PHI_WORD: Final = "functools"


def granite_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the readers of Granite's calls; Granite 3.1 spells the mark as a tag, Granite 4 closes it."""
    return {MARK: list_of_calls(calls), tagged.BEGIN: list_of_calls(calls, tagged.END)}


def _granite(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"call: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n"
    return CallGrammar(MARK, rules, narrow=spelling.is_special(tagged.BEGIN))


def phi_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the readers of Phi's calls."""
    return {MARK: list_of_calls(calls, PHI_END), PHI_WORD: list_of_calls(calls)}


def _phi(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    rules = f"body: {json_of(list_schema(tools, MOST_CALLS if several else 1))}\n"
    if spelling.is_special(MARK):
        return CallGrammar(MARK, f"call: body {spelling(PHI_END)}\n{rules}")
    return CallGrammar(PHI_WORD, f"call: body\n{rules}")


GRANITE: Final = ToolFormat(
    ToolParser.GRANITE,
    (
        TemplateMarks(("<|start_of_role|>", MARK)),
        TemplateMarks(("<|start_of_role|>", "available_tools"), without=tagged.BEGIN),
    ),
    granite_blocks,
    _granite,
    tokens=(MARK, tagged.BEGIN, tagged.END),
)
PHI4: Final = ToolFormat(
    ToolParser.PHI4,
    (TemplateMarks(("<|tool|>",)), TemplateMarks(("functools[",))),
    phi_blocks,
    _phi,
    tokens=(MARK, PHI_END),
)
