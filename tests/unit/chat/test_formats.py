"""Formats of calls and reasoning: read alike in every division of an answer, chosen by their templates."""

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from inference_service.api.chat.dialect import FORMATS, Dialect, parsers_of
from inference_service.api.chat.formats.reading import AnswerReader
from inference_service.api.chat.request import AnswerCalls
from loramux_shared.runtime import Parsers, ReasoningParser, ToolParser
from tests.support.cases import cases
from tests.support.readings import Collected, read

WEATHER: dict[str, Any] = cases(__file__, "WEATHER")
OFFERED = {"find": WEATHER, "news.top": {}}
T, R = ToolParser, ReasoningParser

CASES: list[tuple[ToolParser, ReasoningParser, str, Collected]] = [
    (ToolParser(tool), ReasoningParser(reasoning), text, expected)
    for tool, reasoning, text, expected in cases(__file__, "CASES")
    if tool in (*FORMATS, "auto", "none")
]


def _reading(tool: ToolParser, reasoning: ReasoningParser) -> AnswerReader:
    return Dialect(tool, reasoning).reading(AnswerCalls(OFFERED), None)


@pytest.mark.parametrize(("tool", "reasoning", "text", "expected"), CASES)
def test_a_form_is_read(tool: ToolParser, reasoning: ReasoningParser, text: str, expected: Collected) -> None:
    """Calls of offered tools are calls, reasoning is told apart, all else is text; letter by letter, too."""
    assert read(_reading(tool, reasoning), text) == expected
    assert read(_reading(tool, reasoning), text, range(1, len(text))) == expected
    for call in expected:
        if call[0] == "call" and text.rstrip().endswith((">", "}", "]", ")")):
            json.loads(call[2])


MARKED = cases(__file__, "MARKED")


def cuts_of(text: str) -> st.SearchStrategy[list[int]]:
    """Places where a text is cut."""
    return st.lists(st.integers(0, len(text)), max_size=8).map(sorted)


@settings(deadline=None)
@given(
    st.sampled_from(list(T)),
    st.sampled_from(list(R)),
    st.lists(st.sampled_from(MARKED), max_size=12)
    .map("".join)
    .flatmap(lambda text: st.tuples(st.just(text), cuts_of(text))),
)
def test_whatever_a_model_writes_is_read_alike(tool, reasoning, drawn: tuple[str, list[int]]) -> None:
    """Any text of marks is read alike in every division of its letters."""
    text, cuts = drawn
    assert read(_reading(tool, reasoning), text, cuts) == read(_reading(tool, reasoning), text)


def test_what_is_held_has_a_bound() -> None:
    """Arguments that come before their name are held only so long, and a header of nothing ends."""
    late = '<tool_call>{"arguments": {"x": "%s"}, "name": "find"}</tool_call>'
    assert read(_reading(T.HERMES, R.NONE), late % "x")[0][0] == "call"
    long = late % ("x" * 300_000)
    assert read(_reading(T.HERMES, R.NONE), long) == [["said", long]]
    assert read(_reading(T.HERMES, R.NONE), long, range(0, len(long), 9999)) == [["said", long]]
    endless = "<|channel|>" + "x " * 999
    assert read(_reading(T.HARMONY, R.HARMONY), endless, range(0, 1999, 99)) == [["said", endless]]


def test_a_prompt_may_have_begun_to_think() -> None:
    """An answer continues in the part that the prompt, or the message that it continues, has opened."""
    dialect = Dialect(T.AUTO, R.THINK)
    opened = dialect.opened("<|im_start|>assistant\n<think>\n")
    read_on = read(dialect.reading(AnswerCalls({}), opened), "hm\n</think>\n\nHi")
    assert read_on == [["thought", "hm"], ["said", "Hi"]]
    assert dialect.opened("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert dialect.opened("what is <think>?<|im_end|>\n<|im_start|>assistant\n") is None
    assert dialect.within("<think>so ") == opened
    assert dialect.within("<think>so</think> it") is None


@pytest.mark.parametrize(("template", "tool", "reasoning"), cases(__file__, "TEMPLATES"))
def test_templates_show_the_dialect(template: str, tool: str, reasoning: str) -> None:
    """The marks in a template show the model's dialect, and the deployment's setting wins."""
    assert parsers_of(template) == Parsers(T(tool), R(reasoning))
    stated = Parsers(T.PHI4, R.NONE)
    assert parsers_of(template, stated) == stated
