"""Forms of tool calls of few families: those of Gemma 4 and FunctionGemma, and calls as Python has them."""

from typing import Final

from loramux_calls.gemma import FUNCTIONGEMMA, GEMMA4
from loramux_calls.python import OLMO3, PYTHONIC, TOOL_CODE

FORMATS: Final = (GEMMA4, FUNCTIONGEMMA, OLMO3, TOOL_CODE, PYTHONIC)
"""The formats of this extension."""
