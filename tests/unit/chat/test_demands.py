"""Round trips: a rendered turn is parsed as the same turn, and satisfies its own demand."""

import json
import random
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from inference_service.api.chat.conversation import Demand
from inference_service.api.chat.dialect import FORMATS, Dialect, parsers_of
from inference_service.api.chat.formats.lark import OfferedTool
from inference_service.api.chat.request import AnswerCalls
from inference_service.core.constraint import Constraint
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.sandbox import grammars as sandbox
from inference_service.text.sandbox.grammars import LIMITS, put_into
from inference_service.text.text import Text
from loramux_shared.faults import RequestInvalid
from loramux_shared.runtime import Parsers, ReasoningParser, ToolParser
from tests.support.cases import cases
from tests.support.examples import examples
from tests.support.family_templates import FAMILIES, Family
from tests.support.readings import read

T, R = ToolParser, ReasoningParser
FIND = cases(__file__, "FIND")
OFFERED: dict[str, Any] = {"find": FIND, "news": {"type": "object", "properties": {}}}
TOOLS_OFFERED = [OfferedTool(name, schema) for name, schema in OFFERED.items()]
ARGUMENTS = {"city": 'Os"lo', "days": 3, "more": {"tags": ["a", "b"]}}
CALLS: list[dict[str, Any]] = [
    {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": ARGUMENTS}},
    {"id": "call_2", "type": "function", "function": {"name": "news", "arguments": {}}},
]

SCHEMA = Constraint("json_schema", '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')

BEGINS = {T(tool): begin for tool, begin in cases(__file__, "BEGINS").items()}
"""Answers that have begun a call."""
CLOSING = set(b'"}])>/\n')
"""Bytes without which random text would not end."""


class Bytes:
    """A vocabulary of bytes and special tokens, of which the last is the end."""

    bos_token_id = None

    def __init__(self, special: Sequence[str]) -> None:
        self.special = (*special, "</end>")
        self.tokens = [*(bytes([byte]) for byte in range(256)), *(name.encode() for name in self.special)]
        self.special_token_ids = range(256, len(self.tokens))
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokenize; the text of a special token becomes that token."""
        words = text.encode() if isinstance(text, str) else text
        marks = re.split(b"(" + b"|".join(re.escape(name.encode()) for name in self.special) + b")", words)
        parts = ([self.tokens.index(part)] if part in self.tokens[256:] else list(part) for part in marks)
        return [token for part in parts for token in part]

    def text(self) -> Text:
        """The text side of a model with it, as far as a grammar asks."""
        ids = dict(zip(self.special, self.special_token_ids, strict=True))
        vocabulary = SimpleNamespace(special=frozenset(self.special_token_ids))
        return cast(Text, SimpleNamespace(token_id=ids.get, vocabulary=vocabulary))


def accepts(constraint: Constraint | None, text: str, vocabulary: Bytes) -> bool:
    """True where a text belongs to the language of a constraint."""
    grammar = constraint.text
    if constraint.kind == "json_schema":
        grammar = LLMatcher.grammar_from_json_schema(grammar)
    if constraint.around:
        grammar = put_into(constraint.around, grammar)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(vocabulary)), grammar, limits=LIMITS, log_level=0)
    assert matcher.get_error() == ""
    return all(map(matcher.consume_token, vocabulary(text))) and bool(matcher.is_accepting())


def demand(family: Family) -> tuple[Demand, Bytes]:
    """Return a demand of a family, and its vocabulary."""
    vocabulary = Bytes(family.special)
    return Demand(Dialect(family.tool, family.reasoning), vocabulary.text()), vocabulary


async def answer_of(family: Family, turn: dict[str, Any]) -> tuple[str, str]:
    """Return the prompt of a turn, and the turn as the template writes it behind that."""
    template = ChatTemplate(family.template, {})
    user = {"role": "user", "content": "Hi"}
    turns = Dialect(family.tool, family.reasoning).turns([user, turn])
    prompt = await template.render([user])
    whole = await template.render(turns, add_generation_prompt=False)
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :].rpartition(family.end)[0]


def as_models_write(family: Family, call: str) -> str:
    """Return the call of ``find`` where a template has it otherwise: with an id, or the recipient first."""
    if family.tool is T.HARMONY:
        return "<|channel|>commentary to=functions.find <|constrain|>json<|message|>" + json.dumps(ARGUMENTS)
    return re.sub(r', "id": "\w+"', "", call)


def head_of(family: Family) -> str:
    return "<|channel|>final<|message|>" if family.tool is T.HARMONY else ""


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_turn_of_a_family_is_read_as_what_it_was(name: str) -> None:
    """A turn that a family's template renders is read as its text, calls and reasoning."""
    family = FAMILIES[name]
    assert parsers_of(family.template) == Parsers(family.tool, family.reasoning)
    dialect = Dialect(family.tool, family.reasoning)
    single = family.tool in (T.LLAMA3_JSON, T.HARMONY)
    thinks = name in ("Qwen 3", "Qwen 3.5", "Ministral 3", "Gemma 4", "gpt-oss")
    leading = family.tool in (T.LLAMA3_JSON, T.PYTHONIC)
    turn: dict[str, Any] = {"role": "assistant", "content": "" if leading or single else "Let me see."}
    turn |= {"tool_calls": CALLS[:1] if single else CALLS}
    if thinks:
        turn |= {"reasoning_content": "They ask\nfor it.", "reasoning": "They ask\nfor it."}
    prompt, answer = await answer_of(family, turn)
    reading = dialect.reading(AnswerCalls(OFFERED), dialect.opened(prompt))
    received = read(reading, answer, range(1, len(answer)))
    calls = [(each[1], json.loads(each[2])) for each in received if each[0] == "call"]
    assert calls == [(each["function"]["name"], each["function"]["arguments"]) for each in turn["tool_calls"]]
    texts = [each[1].strip() for each in received if each[0] == "said"]
    assert texts == [turn["content"]] * bool(turn["content"])
    assert [each[1] for each in received if each[0] == "thought"] == ["They ask\nfor it."] * thinks


def test_what_a_form_cannot_say_is_demanded_as_json() -> None:
    """A pattern of a text between tags: one call as JSON, behind the reasoning that the prompt has opened."""
    family = FAMILIES["Qwen 3.5"]
    expected, vocabulary = demand(family)
    tools = [OfferedTool("f", {"type": "object", "properties": {"x": {"type": "string", "pattern": "^a+$"}}})]
    assert expected.form(tools, several=True) is None
    constraint = expected.calls(tools, None, "<|im_start|>assistant\n<think>\n")
    assert accepts(constraint, 'hm\n</think>\n\n{"name": "f", "arguments": {"x": "aa"}}', vocabulary)
    assert not accepts(constraint, 'hm\n</think>\n\n{"name": "f", "arguments": {"x": "b"}}', vocabulary)
    assert not accepts(constraint, '{"name": "f", "arguments": {"x": "aa"}}', vocabulary)
    with pytest.raises(RequestInvalid, match="pattern"):
        expected.constrain_text(tools, ["f"])
    assert expected.constrain_text(tools, [])("") is None
    with pytest.raises(RequestInvalid, match="pattern"):
        expected.constrain_to_calls_or(SCHEMA, tools, True)


@pytest.mark.parametrize("name", FAMILIES)
async def test_an_answer_in_a_format_may_be_a_call_instead(name: str) -> None:
    """The grammar of an answer with a schema and tools accepts JSON of the schema, or a call."""
    family = FAMILIES[name]
    expected, vocabulary = demand(family)
    turn = {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}
    prompt, call = await answer_of(family, turn | {"reasoning_content": "", "reasoning": ""})
    call = as_models_write(family, call)
    call = call.removeprefix("\n") if name == "Qwen 2.5" else call
    thought, head = "</think>\n\n" if name == "Qwen 3.5" else "", head_of(family)
    constraint = expected.constrain_to_calls_or(SCHEMA, TOOLS_OFFERED, True)(prompt)
    assert accepts(constraint, f'{thought}{head}{{"a": 1}}', vocabulary)
    assert accepts(constraint, call, vocabulary)
    for wrong in (f"{thought}{head}Hi", f'{thought}{head}{{"a": 2}}', call.replace("find", "fine"), call[:-1]):
        assert not accepts(constraint, wrong, vocabulary)


def test_calls_of_tools_that_are_not_strict_are_held_to_their_form() -> None:
    """A call is held to a form with a mark, whose grammar models follow; but it can be done without."""
    tools = [OfferedTool("find", {"type": "object"})]
    held = set()
    for name, family in FAMILIES.items():
        expected, vocabulary = demand(family)
        constraint = expected.constrain_text(tools, [])("")
        strict = expected.constrain_text(tools, ["find"])("")
        assert strict is None or not strict.optional
        if constraint is not None:
            assert constraint.optional
            assert accepts(constraint, f"{head_of(family)}It [rains]: {{}}.", vocabulary)
            held.add(name)
    free = {T.LLAMA3_JSON, T.PYTHONIC, T.OLMO3, T.TOOL_CODE}
    assert held == {name for name, family in FAMILIES.items() if family.tool not in free}


@pytest.mark.parametrize("marks", ["special", "text"])
@pytest.mark.parametrize("tool", [tool for tool in BEGINS if tool in FORMATS])
def test_whatever_a_grammar_lets_pass_is_read_as_whole_calls(tool: ToolParser, marks: str) -> None:
    """Random answers that begin a call: each is of an offered tool, and its arguments keep to the schema."""
    dialect = Dialect(tool, R.NONE)
    vocabulary = Bytes(tuple(dict.fromkeys(dialect.tokens)) if marks == "special" else ())
    tokenizer, draw, whole = LLTokenizer(TokenizerWrapper(vocabulary)), random.Random(tool), 0
    for strict in ([], ["find", "news"]):
        tools = (
            TOOLS_OFFERED if strict else [OfferedTool(each.name, {"type": "object"}) for each in TOOLS_OFFERED]
        )
        constraint = Demand(dialect, vocabulary.text()).constrain_text(tools, strict)("")
        for _ in range(examples(6) if constraint else 0):
            matcher = LLMatcher(tokenizer, constraint.text, limits=LIMITS, log_level=0)
            begin = "functools" if (tool, marks) == (T.PHI4, "text") else BEGINS[tool]
            text = walk(matcher, vocabulary, draw, begin)
            if text is None:
                continue
            received = read(dialect.reading(AnswerCalls(OFFERED), None), text)
            calls = [each for each in received if each[0] == "call"]
            assert calls, text
            for _, called, arguments in calls:
                assert isinstance(json.loads(arguments), dict), text
                if strict:
                    jsonschema.validate(json.loads(arguments), OFFERED[called])
            whole += 1
    assert whole > 2


def walk(matcher: LLMatcher, vocabulary: Bytes, draw: random.Random, begin: str) -> str | None:
    """Write random text that a grammar allows, up to a stop; None where none comes."""
    written = list(vocabulary(begin))
    assert all(map(matcher.consume_token, written)), begin
    for _ in range(600):
        if matcher.is_accepting():
            return b"".join(vocabulary.tokens[token] for token in written).decode(errors="replace")
        mask = matcher.compute_bitmask()
        may = [token for token in range(vocabulary.eos_token_id) if mask[token // 8] >> token % 8 & 1]
        closing = [token for token in may if token > 255 or token in CLOSING]
        token = draw.choice(closing if closing and draw.random() < 0.7 else may)
        assert matcher.consume_token(token)
        written.append(token)
    return None


def test_reasoning_may_come_before_what_is_asked_for() -> None:
    """The grammar of a schema accepts reasoning in front where the prompt leaves it open."""
    expected, vocabulary = demand(FAMILIES["Qwen 3"])
    free = expected.behind_reasoning(SCHEMA, "<|im_start|>assistant\n")
    assert accepts(free, '{"a": 1}', vocabulary)
    assert accepts(free, '<think>\nhm {"a"\n</think>\n\n{"a": 1}', vocabulary)
    assert expected.behind_reasoning(SCHEMA, "<think>\n\n</think>\n\n") == SCHEMA
    expected, vocabulary = demand(FAMILIES["gpt-oss"])
    free = expected.behind_reasoning(SCHEMA, "<|start|>assistant")
    final = '<|channel|>final<|message|>{"a": 1}'
    assert accepts(free, final, vocabulary)
    assert accepts(free, f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{final}", vocabulary)
    expected, vocabulary = demand(FAMILIES["Qwen 2.5"])
    assert expected.behind_reasoning(SCHEMA, "") == SCHEMA


def test_a_call_of_mistral_may_have_an_id() -> None:
    """Small 3.2 writes one between name and arguments, later models do not."""
    expected, vocabulary = demand(FAMILIES["Ministral 3"])
    constraint = expected.calls(TOOLS_OFFERED, expected.form(TOOLS_OFFERED, several=True), "")
    for text in ("[TOOL_CALLS]news[CALL_ID]a23456789[ARGS]{}", "[TOOL_CALLS]news[ARGS]{}" * 2):
        assert accepts(constraint, text, vocabulary)
    assert not accepts(constraint, "[TOOL_CALLS]news[CALL_ID]a2[ARGS]{}", vocabulary)


def test_a_trial_of_a_grammar_knows_no_tokens_by_number() -> None:
    """A numbered token of a model's vocabulary is tried as the one special token of the sandbox."""
    trial = LLTokenizer(TokenizerWrapper(sandbox.Bytes()))
    assert sandbox.answer(trial, 'start: <[151657]> "a"') == {}
    assert "error" in sandbox.answer(trial, 'start: <[151657] "a"')
    composed = sandbox.translated({"gbnf": 'start: "a"', "around": 'start: <[9999]> "x" @answer\n'})
    assert sandbox.answer(trial, composed["grammar"]) == {}
    assert "<[9999]>" in composed["grammar"]


def test_references_of_a_schema_are_found_in_every_form() -> None:
    """A value that a definition describes is held to it, also where it stands alone in its form."""
    schema = {
        "type": "object",
        "properties": {"days": {"$ref": "#/$defs/Days"}},
        "required": ["days"],
        "$defs": {"Days": {"type": "integer", "enum": [1, 2]}},
    }
    tools = [
        OfferedTool("f", schema),
        OfferedTool("g", {"type": "object", "$defs": {"Days": {"type": "string"}}}),
    ]
    families = {"Llama 3.2, pythonic": "[f(days=2)]", "Qwen 2.5": ""}
    for name, text in ((name, text) for name, text in families.items() if name in FAMILIES):
        expected, vocabulary = demand(FAMILIES[name])
        text = text or '<tool_call>\n{"name": "f", "arguments": {"days": 2}}\n</tool_call>'
        constraint = expected.calls(tools, expected.form(tools, several=False), "")
        assert accepts(constraint, text, vocabulary)
        assert not accepts(constraint, text.replace("2", "3"), vocabulary)
