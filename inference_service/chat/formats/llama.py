"""Calls without a mark, with which an answer begins: of Llama 3, as JSON.

::

    {"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "news", "parameters": {}}
    <|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}

Source: the chat template of Llama-3.2-3B-Instruct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from inference_service.chat.formats.format import TemplateMarks, ToolFormat
from inference_service.chat.formats.frame import Block
from inference_service.chat.formats.json_calls import json_calls
from inference_service.chat.formats.lark import CallGrammar, OfferedTool, Spelling, calls_schema, json_of
from inference_service.chat.formats.source import AnswerSource, Reader
from inference_service.chat.pieces import AnswerCalls
from loramux_shared.runtime import ToolParser

PYTHON_TAG: Final = "<|python_tag|>"


def llama_leading(calls: AnswerCalls) -> Block:
    """Return the reader of calls as JSON."""

    def read(source: AnswerSource) -> Reader[bool]:
        return (yield from json_calls(source, calls))

    return read


def llama_blocks(calls: AnswerCalls) -> Mapping[str, Block]:
    """Return the reader of calls behind the tag."""

    def read(source: AnswerSource) -> Reader[bool]:
        yield from source.spaces()
        return (yield from json_calls(source, calls))

    return {PYTHON_TAG: read}


def _llama(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    del spelling, several  # Llama's template renders one call
    return CallGrammar("", f"call: {json_of(calls_schema(tools, 'parameters'))}\n")


LLAMA3_JSON: Final = ToolFormat(
    ToolParser.LLAMA3_JSON,
    (TemplateMarks(("<|start_header_id|>", '"parameters"')), TemplateMarks((PYTHON_TAG,))),
    llama_blocks,
    _llama,
    leading=llama_leading,
    tokens=(PYTHON_TAG,),
)
