"""The map from OpenAI's bodies to requests, and the parts of an answer."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from inference_service.adapters.catalog import Catalog
from inference_service.chat.conversation import AnswerPart
from inference_service.chat.request import NO_HEADERS, TextPiece, Thought
from inference_service.core.sequence import EndReason
from inference_service.http.openai.chat import ChatChoice
from inference_service.http.openai.chat_schema import ChatBody
from inference_service.http.openai.mapping import chat_of, completion_requests
from inference_service.http.openai.schema import CompletionBody
from inference_service.serving.request import AnswerDelta, AnswerFinished, Request
from inference_service.serving.service import GenerationService
from inference_service.serving.terms import ServingLimits
from loramux_shared.faults import RequestInvalid
from tests.support.cases import cases
from tests.support.generations import change_deployed


class Named(GenerationService):
    """A service that has limits, and cannot answer."""

    def __init__(self, default_max_tokens: int | None = None) -> None:
        self.limits = ServingLimits(256, frozenset({2}))
        self.catalog = Catalog(1, "base", [])
        change_deployed(self.catalog, request_default_max_tokens=default_max_tokens)


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
    assert (_completion().sampling.max_tokens, _completion(Named(99)).sampling.max_tokens) == (16, 99)
    assert _completion(max_tokens=0, echo=True).sampling.prompt_logprobs == 0


@pytest.mark.parametrize(("fields", "param"), cases(__file__, "test_contradictions_are_refused"))
def test_contradictions_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        _chat(**fields)
    assert [finding.where for finding in caught.value.findings] == [param]


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
    choice.take(AnswerPart(AnswerFinished(EndReason.STOP, "", 1, 3, 0), []))
    deltas = [part["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[1] == {"reasoning_content": "Let me ", "reasoning": "Let me "}
    assert deltas[3] == {"content": "Yes."}
    message = choice.whole()["message"]
    assert (message["content"], message["reasoning"]) == ("Yes.", "Let me see.")
    assert message["reasoning_content"] == message["reasoning"]
