"""Which parsers a chat template shows: marks of forms of calls and of reasoning stand in their templates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from inference_service.text.chat_template import ChatTemplate
from loramux_shared.parsers import Parsers, ReasoningParser, ToolParser

TOOL_MARKS: Final[Sequence[tuple[ToolParser, tuple[str, ...]]]] = (
    (ToolParser.HARMONY, ("<|channel|>", "<|message|>")),
    (ToolParser.GEMMA4, ("<|tool_call>",)),
    (ToolParser.FUNCTIONGEMMA, ("<start_function_call>",)),
    (ToolParser.MISTRAL, ("[TOOL_CALLS]",)),
    (ToolParser.OLMO3, ("<function_calls>",)),
    (ToolParser.PHI4, ("<|tool|>",)),
    (ToolParser.PHI4, ("functools[",)),
    (ToolParser.QWEN3_CODER, ("<function=", "<tool_call>")),
    (ToolParser.GRANITE, ("<|start_of_role|>", "<|tool_call|>")),
    (ToolParser.HERMES, ("<tool_call>",)),
    (ToolParser.GRANITE, ("<|start_of_role|>", "available_tools")),
    (ToolParser.TOOL_CODE, ("```tool_code",)),
    (ToolParser.PYTHONIC, ("func_name1(",)),
    (ToolParser.LLAMA3_JSON, ("<|start_header_id|>", '"parameters"')),
    (ToolParser.LLAMA3_JSON, ("<|python_tag|>",)),
)
"""Texts that all stand in the templates of a form; the first row that fits counts."""
REASONING_MARKS: Final[Sequence[tuple[ReasoningParser, tuple[str, ...]]]] = (
    (ReasoningParser.HARMONY, ("<|channel|>", "<|message|>")),
    (ReasoningParser.GEMMA4, ("<|channel>",)),
    (ReasoningParser.MISTRAL, ("[THINK]",)),
    (ReasoningParser.GRANITE, ("<|start_of_role|>", "<response>")),
    (ReasoningParser.GRANITE, ("my thought process:",)),
    (ReasoningParser.THINK, ("<think>",)),
    (ReasoningParser.THINK, ("</think>",)),
)


def parsers_of(template: ChatTemplate | None, said: Parsers) -> Parsers:
    """Return what is said, and where that is auto what a template shows; auto where it shows nothing."""
    return shown(template.source if template else "", said)


@lru_cache(maxsize=128)
def shown(source: str, said: Parsers = Parsers()) -> Parsers:  # noqa: B008 - frozen
    """Return the same for the text of a template."""
    tool, reasoning = said.tool, said.reasoning
    if tool is ToolParser.AUTO:
        tool = next((each for each, words in TOOL_MARKS if _holds(source, words)), tool)
    if reasoning is ReasoningParser.AUTO:
        reasoning = next((each for each, words in REASONING_MARKS if _holds(source, words)), reasoning)
    return Parsers(tool, reasoning)


def _holds(source: str, words: Sequence[str]) -> bool:
    return all(word in source for word in words)
