"""Chat templates of families in a few lines: turns, calls and reasoning stand where the real ones have them."""

from dataclasses import dataclass

from inference_service.chat.dialect import FORMATS
from loramux_shared.runtime import ReasoningParser, ToolParser
from tests.support.cases import cases


@dataclass(frozen=True)
class Family:
    """A template, and what is known of its models."""

    template: str
    tool: ToolParser
    reasoning: ReasoningParser
    special: tuple[str, ...] = ()
    """Marks that are special tokens of its models."""
    end: str = "<|im_end|>"
    """End mark of a turn."""


FAMILIES = {
    name: Family(template, ToolParser(tool), ReasoningParser(reasoning), tuple(special), end)
    for name, (template, tool, reasoning, special, end) in cases(__file__, "FAMILIES").items()
    if tool in FORMATS
}
"""Published templates of families whose calls are read, by the name of the models."""
