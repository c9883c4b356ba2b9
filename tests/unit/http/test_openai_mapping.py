"""OpenAI's bodies as requests, the parts of an answer, and a chat in between in the model's dialect."""

import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer

from inference_service.adapters.catalog import Catalog
from inference_service.api.chat.conversation import AnswerPart, Conversation
from inference_service.api.chat.request import NO_HEADERS, Piece, TextPiece, Thought
from inference_service.api.http.openai.chat import ChatChoice
from inference_service.api.http.openai.chat_schema import ChatBody
from inference_service.api.http.openai.mapping import chat_of, completion_requests
from inference_service.api.http.openai.schema import CompletionBody
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import ServingLimits
from inference_service.core.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Event,
    Request,
    TokenUsage,
)
from inference_service.core.sequence import EndReason
from inference_service.driver.port import Driver
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text
from loramux_shared.faults import RequestInvalid
from loramux_shared.runtime import ReasoningParser, ToolParser
from tests.golden.openai.script import Case, Scripted
from tests.support.cases import cases
from tests.support.family_templates import FAMILIES
from tests.support.generations import change_deployed
from tests.support.readings import Collected, merge_pieces
from tests.support.tokens import VOCAB, write_tokenizer


class Named(GenerationService):
    """A service that has limits, and cannot answer."""

    def __init__(self, default_max_tokens: int | None = None) -> None:
        self.limits = ServingLimits(256, frozenset({2}))
        catalog = Catalog(1, "base", [])
        change_deployed(catalog, request_default_max_tokens=default_max_tokens)
        self.driver = cast(Driver, SimpleNamespace(deployed=catalog.deployed))


def _chat(headers: Mapping[str, str] = NO_HEADERS, **fields: Any) -> Request:
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}]} | fields
    return chat_of(ChatBody.model_validate_json(json.dumps(body)), headers).request()


def _completion(service: Named | None = None, **fields: Any) -> Request:
    body = {"model": "base", "prompt": "x"} | fields
    [request] = completion_requests(CompletionBody.model_validate_json(json.dumps(body)), service or Named())
    return request


def test_the_temperature_is_left_to_the_adapter() -> None:
    """The request's temperature comes first, then the adapter's, then the API's 1."""
    assert (_chat().sampling.temperature, _chat().sampling.usual_temperature) == (None, 1.0)
    assert _chat(temperature=0).sampling.temperature == 0
    assert _completion().sampling.usual_temperature == 1.0


@pytest.mark.parametrize("expected", ["", "-1", "1.5", "seven", "1" * 20, str(2**63)])
def test_a_header_that_is_no_generation_is_refused_by_name(expected: str) -> None:
    """A typing mistake in a header is no reason to answer with an older version."""
    with pytest.raises(RequestInvalid) as refused:
        _chat({"x-loramux-min-generation": expected})
    assert refused.value.findings[0].where.endswith("min-generation") or expected == str(2**63)


def test_lengths() -> None:
    """An unset length of a chat is left to the service; that of a plain prompt is 16, or the deployment's."""
    assert _chat().sampling.max_tokens is None
    assert _chat(max_tokens=3).sampling.max_tokens == 3
    assert _chat(max_completion_tokens=4).sampling.max_tokens == 4
    assert _chat(max_completion_tokens=5, max_tokens=5).sampling.max_tokens == 5
    assert _chat(max_completion_tokens=5, max_tokens=7).sampling.max_tokens == 5
    assert _chat(max_completion_tokens=7, max_tokens=5).sampling.max_tokens == 5
    assert (_completion().sampling.max_tokens, _completion(Named(99)).sampling.max_tokens) == (16, 99)
    assert _completion(max_tokens=0, echo=True).sampling.prompt_logprobs == 0


def test_the_template_gets_how_long_to_think() -> None:
    """Reasoning effort in OpenAI's spelling, none as the templates' switches; explicit switches come first."""
    assert _chat().prompt.chat_template_kwargs == {}
    assert _chat(reasoning_effort="low").prompt.chat_template_kwargs == {"reasoning_effort": "low"}
    off = {"enable_thinking": False, "thinking": False, "reasoning_effort": "none"}
    assert _chat(reasoning_effort="none").prompt.chat_template_kwargs == off
    own = {"thinking": True, "x": [1]}
    query = _chat(reasoning_effort="none", chat_template_kwargs=own)
    assert query.prompt.chat_template_kwargs == off | own


def test_thoughts_have_both_names() -> None:
    """Reasoning stands beside the content, in a message and in chunks, under vLLM's two names."""
    choice = ChatChoice(0, [], None, ids=False)
    parts = choice.parts(
        AnswerPart(AnswerDelta("ab", ()), [Thought("Let me "), Thought("see."), TextPiece("Yes.")])
    )
    choice.take(AnswerPart(AnswerFinished(EndReason.STOP, "", TokenUsage(1, 3, 0)), []))
    deltas = [part["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[1] == {"reasoning_content": "Let me ", "reasoning": "Let me "}
    assert deltas[3] == {"content": "Yes."}
    message = choice.whole()["message"]
    assert (message["content"], message["reasoning"]) == ("Yes.", "Let me see.")
    assert message["reasoning_content"] == message["reasoning"]


FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "Hi"}
CALL = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'


class Speaks(Scripted):
    """Says one text, in two parts, whatever it is asked."""

    def __init__(self, folder: Path, family: str, says: str) -> None:
        write_tokenizer(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens(["\n"])
        tokenizer.add_special_tokens(list(FAMILIES[family].special))
        template = ChatTemplate(FAMILIES[family].template, {})
        super().__init__(Case("chat", {}, [says]), Text(tokenizer, template, VOCAB + 20))
        self.asked: list[Request] = []
        self.constraint = ""
        """Constraint of the last answer, as Lark or as a schema."""

    async def generate(self, request: Request, _sink: object = None) -> AsyncGenerator[Event]:
        self.asked.append(request)
        model = self.local.catalog.get(request.model.name)
        turns: Any = request.prompt.content
        tokens = await self.text.encode_messages(turns, 9999, None, (), request.prompt.chat_template_kwargs)
        if request.output.constraint_by_ending is not None:
            made = request.output.constraint_by_ending.behind(self.text.end_of(tokens))
            self.constraint = f"{made.around}{made.text}" if made else ""
        yield AnswerStarted(request.id, model, 7, len(tokens), self.text, tuple(tokens))
        [says] = self._case.answers
        for part in (says[:20], says[20:]):
            yield AnswerDelta(part, ())
        yield AnswerFinished(EndReason.STOP, "", TokenUsage(len(tokens), 0, 1))


async def ask(service: Speaks, **fields: Any) -> Collected:
    body = ChatBody.model_validate_json(json.dumps({"model": "tiny", "messages": [USER]} | fields))
    pieces: list[Piece] = []
    async for event in Conversation(service, chat_of(body)).events():
        if isinstance(event, AnswerPart):
            pieces += event.pieces
    return merge_pieces(pieces)


async def test_an_answer_goes_on_thinking_where_the_prompt_began(tmp_path: Path) -> None:
    """The end of the rendered prompt says whether the first text is reasoning; a client may not want it."""
    service = Speaks(tmp_path, "Qwen 3.5", "They ask.\n</think>\n\nHello.")
    assert await ask(service) == [["thought", "They ask."], ["said", "Hello."]]
    assert await ask(service, include_reasoning=False) == [["said", "Hello."]]
    service = Speaks(tmp_path, "Qwen 3", "They ask.\n</think>\n\nHello.")
    assert await ask(service) == [["said", "They ask.\n</think>\n\nHello."]]
    going_on = {"role": "assistant", "content": "<think>\nThey"}
    flags = {"add_generation_prompt": False, "continue_final_message": True}
    assert (await ask(service, messages=[USER, going_on], **flags))[0] == ["thought", "They ask."]


async def test_marks_that_are_special_tokens_are_asked_for(tmp_path: Path) -> None:
    """Special tokens of a dialect stay in the text for the parser, and ids of calls fit the template."""
    service = Speaks(tmp_path, "Ministral 3", "[TOOL_CALLS]find[ARGS]{}")
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    turns = [USER, {"role": "assistant", "tool_calls": [call]}]
    turns.append({"role": "tool", "content": "4", "tool_call_id": "call_1"})
    assert await ask(service, messages=turns, tools=[FIND]) == [["call", "find", "{}"]]
    [query] = service.asked
    assert "[TOOL_CALLS]" in query.output.shown_special_tokens
    _, called, answered = list(query.prompt.content)
    assert isinstance(called, dict)
    assert isinstance(answered, dict)
    assert called["tool_calls"][0]["id"] == answered["tool_call_id"]
    assert len(answered["tool_call_id"]) == 9
    await ask(service)
    assert service.asked[-1].output.shown_special_tokens == ("[THINK]", "[/THINK]", "<think>", "</think>")


async def test_one_call_is_one_call(tmp_path: Path) -> None:
    """Without parallel calls an answer ends behind its first call."""
    service = Speaks(tmp_path, "Qwen 2.5", CALL * 2)
    assert len(await ask(service, tools=[FIND])) == 2
    assert len(await ask(service, tools=[FIND], parallel_tool_calls=False, stop="x")) == 1
    assert service.asked[-1].sampling.stop == ("x", "</tool_call>")
    await ask(service, tools=[FIND], parallel_tool_calls=False, tool_choice="required")
    assert service.asked[-1].sampling.stop == ()


@pytest.mark.parametrize(
    ("family", "says", "fields", "constraint"),
    cases(__file__, "test_what_is_demanded_is_demanded_in_the_dialect"),
)
async def test_what_is_demanded_is_demanded_in_the_dialect(
    tmp_path: Path, family: str, says: str, fields: dict[str, Any], constraint: str
) -> None:
    """A demand for calls, for text with calls, or for a format behind reasoning is a grammar of the dialect."""
    service = Speaks(tmp_path, family, says)
    reported = await ask(service, **{"tools": [FIND]} | fields)
    assert reported == [["call", "find", "{}"]] if says == CALL else reported == [["said", says]]
    assert constraint in service.constraint
    assert bool(constraint) == bool(service.constraint)


async def test_without_marks_a_demanded_call_is_plain_json(tmp_path: Path) -> None:
    """A schema that the form cannot say: JSON is demanded and read, and strictness is refused by name."""
    parameters = {"type": "object", "properties": {"x": {"type": "string", "pattern": "a"}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": parameters, "strict": True}}
    service = Speaks(tmp_path, "Qwen 3.5", 'Hm.</think>{"name": "find", "arguments": {"x": "a"}}')
    reported = await ask(service, tools=[tool], tool_choice="required")
    assert reported == [["thought", "Hm."], ["call", "find", '{"x": "a"}']]
    assert '"pattern": "a"' in service.constraint
    with pytest.raises(RequestInvalid, match="pattern"):
        await ask(service, tools=[tool])


async def test_half_a_demanded_call_is_not_sent(tmp_path: Path) -> None:
    """A demanded call that is cut off before its name is dropped; text that may be a call is kept."""
    service = Speaks(tmp_path, "Qwen 2.5", CALL + '\n<tool_call>{"name": "fi')
    assert await ask(service, tools=[FIND], tool_choice="required") == [["call", "find", "{}"]]
    assert (await ask(service, tools=[FIND]))[-1] == ["said", '<tool_call>{"name": "fi']


async def test_a_deployment_says_which_parsers(tmp_path: Path) -> None:
    """The deployment's parsers come before those of the template."""
    service = Speaks(tmp_path, "Qwen 3", "<think>Hm.</think>" + CALL)
    assert await ask(service, tools=[FIND]) == [["thought", "Hm."], ["call", "find", "{}"]]
    change_deployed(service.local.catalog, tool_parser=ToolParser.NONE, reasoning_parser=ReasoningParser.NONE)
    assert await ask(service, tools=[FIND]) == [["said", "<think>Hm.</think>" + CALL]]
