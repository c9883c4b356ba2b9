"""Forms of tool calls of few families: those of Gemma 4 and FunctionGemma, and calls as Python has them."""

from typing import Final

from inference_service.chat.formats.gemma import FUNCTIONGEMMA, GEMMA4
from inference_service.chat.formats.python_calls import OLMO3, PYTHONIC, TOOL_CODE

FORMATS: Final = (GEMMA4, FUNCTIONGEMMA, OLMO3, TOOL_CODE, PYTHONIC)
"""The formats of this extension."""
