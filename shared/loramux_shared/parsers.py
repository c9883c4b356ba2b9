"""Parsers of chat answers: the format of tool calls, and that of reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ToolParser(StrEnum):
    """The form in which a model writes calls of tools."""

    AUTO = "auto"
    """The format that the chat template shows."""
    NONE = "none"
    """Calls stay text."""
    HERMES = "hermes"
    QWEN3_CODER = "qwen3_coder"
    LLAMA3_JSON = "llama3_json"
    PYTHONIC = "pythonic"
    OLMO3 = "olmo3"
    TOOL_CODE = "tool_code"
    MISTRAL = "mistral"
    GRANITE = "granite"
    PHI4 = "phi4"
    GEMMA4 = "gemma4"
    FUNCTIONGEMMA = "functiongemma"
    HARMONY = "harmony"


class ReasoningParser(StrEnum):
    """The marks between which a model reasons."""

    AUTO = "auto"
    """The format that the chat template shows."""
    NONE = "none"
    """Reasoning stays text."""
    THINK = "think"
    GRANITE = "granite"
    MISTRAL = "mistral"
    GEMMA4 = "gemma4"
    HARMONY = "harmony"


@dataclass(frozen=True)
class Parsers:
    """The parsers that a deployment, or a replica, sets for all its models."""

    tool: ToolParser = ToolParser.AUTO
    reasoning: ReasoningParser = ReasoningParser.AUTO
