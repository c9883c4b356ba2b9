"""``POST /v1/responses``: every answer and event is OpenAI's, and a chat is behind it."""

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest
import pytest_asyncio
from pydantic import BaseModel

from inference_service.core.sequence import EndReason
from loramux_shared.faults import RateLimited, ReplicaFailed, RequestInvalid
from loramux_shared.runtime import ReasoningParser
from tests.contract.http.response_checks import check_events, check_response, read_stream
from tests.contract.http.scripted_service import ScriptedApi, open_scripted
from tests.support.cases import cases
from tests.support.generations import change_deployed

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
TIME = {"type": "function", "name": "time", "description": "Tell the time.", "parameters": {}}
FIELDS: dict[str, Any] = {"model": "pirate", "input": "Hi"}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


class Verdict(BaseModel):
    fine: bool
    color: Literal["red", "blue"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedApi]:
    async with open_scripted(tmp_path_factory.mktemp("scripted")) as api:
        yield api


SAYS = cases(__file__, "says")


@pytest.mark.parametrize("name", SAYS)
async def test_events_tell_the_response(api: ScriptedApi, name: str) -> None:
    """Streamed or whole, the items are the same, and each event is one of OpenAI's."""
    case = SAYS[name]
    api.service.say(case["said"], reason=EndReason(case["reason"]))
    answer = await api.post(PATH, **FIELDS, **case["fields"])
    whole = check_response(answer.json())
    api.service.say(case["said"], reason=EndReason(case["reason"]))
    streamed = await api.post(PATH, **FIELDS, **case["fields"], stream=True)
    last = check_events(read_stream(streamed.content))
    assert whole["status"] == ("incomplete" if case["reason"] == "length" else "completed")
    assert _without_ids(last) == _without_ids(whole)
    if case["items"]:
        assert [_role_and_text(item) for item in whole["output"]] == case["items"]
    for head in (answer.headers, streamed.headers):
        assert head["x-loramux-model"] == "pirate"


def _role_and_text(item: dict[str, Any]) -> list[str]:
    return [item["type"], item["arguments"] if "arguments" in item else item["content"][0]["text"]]


def _without_ids(response: dict[str, Any]) -> Any:
    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(walk, value))
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items() if not key.endswith(("id", "_at"))}
        return value

    return walk(response)


async def test_the_response_tells_what_was_asked(api: ScriptedApi) -> None:
    """The response repeats the fields of the request, with defaults for the others."""
    requests = cases(__file__, "repeated")
    ignored = {"store": True, "background": False, "service_tier": "flex", "stream": False}
    hints = {"text": {"verbosity": "medium"}, "reasoning": {"summary": "auto"}}
    api.service.say("Ahoy")
    body = (await api.post(PATH, **FIELDS, **requests, **ignored, **hints)).json()
    assert {name: body[name] for name in requests} == requests
    assert [body[name] for name in ("store", "background", "service_tier")] == [False, False, "default"]
    [request] = api.service.asked[-1:]
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_p) == (9, 0.25, 0.5)
    assert (request.sampling.presence_penalty, request.sampling.frequency_penalty) == (0.5, 0.25)
    assert request.model.sticky_key == "u"


async def test_the_client_parses(api: ScriptedApi) -> None:
    """A schema that the client makes of a class constrains the answer."""
    api.service.say('{"fine": true, "color": "red"}')
    answer = await api.openai.responses.parse(**FIELDS, text_format=Verdict)
    assert answer.output_parsed == Verdict(fine=True, color="red")
    [request] = api.service.asked[-1:]
    assert json.loads(request.output.constraint.text)["required"] == ["fine", "color"]


async def test_functions_of_a_namespace(api: ScriptedApi) -> None:
    """The model gets namespace and function name, and a call has both, also when it is sent back."""
    namespace = {"type": "namespace", "name": "sky", "description": "Of the sky.", "tools": [WEATHER, TIME]}
    api.service.say(CALL.replace("weather", "sky__weather"))
    answer = check_response((await api.post(PATH, **FIELDS, tools=[WEATHER, namespace])).json())
    [call] = answer["output"]
    assert (call["namespace"], call["name"]) == ("sky", "weather")
    functions = [tool["function"] for tool in api.service.asked[-1].prompt.tools]
    assert [each["name"] for each in functions] == ["weather", "sky__weather", "sky__time"]
    assert [each.get("description") for each in functions] == [
        None,
        "Of the sky.",
        "Of the sky.\nTell the time.",
    ]
    api.service.say("So.")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}
    requests = [{"role": "user", "content": "Hi"}, call, output]
    await api.post(PATH, model="pirate", input=requests, tools=[namespace])
    [_, turn, _] = api.service.last
    assert turn["tool_calls"][0]["function"]["name"] == "sky__weather"


async def test_reasoning_is_an_item_and_comes_back(api: ScriptedApi) -> None:
    """Reasoning is an item of its own, is counted, and goes into the template again, also when encrypted."""
    change_deployed(api.service.local.catalog, reasoning_parser=ReasoningParser.THINK)
    text = f"<think>H|m.</think>\n\nSo.|{CALL}"
    for more in ({}, {"include": ["reasoning.encrypted_content"]}):
        api.service.say(text)
        streamed = await api.post(PATH, **FIELDS, tools=[WEATHER], stream=True, **more)
        events = read_stream(streamed.content)
        answer = check_events(events)
        thoughts = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
        assert "".join(thoughts) == "Hm."
        assert [_role_and_text(item) for item in answer["output"]] == [
            ["reasoning", "Hm."],
            ["message", "So."],
            ["function_call", '{"city": "Oslo"}'],
        ]
        assert 0 < answer["usage"]["output_tokens_details"]["reasoning_tokens"] < len(text)
        thought, message, call = answer["output"]
        unread = {key: value for key, value in thought.items() if key != "content" or not more}
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}
        api.service.say("So.")
        requests = [{"role": "user", "content": "Hi"}, unread, message, call, output]
        assert (await api.post(PATH, model="pirate", input=requests)).status_code == 200
        [_, turn, _] = api.service.last
        assert (turn["reasoning"], turn["content"], len(turn["tool_calls"])) == ("Hm.", "So.", 1)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (ReplicaFailed("it failed."), 503, "server_error"),
        (RateLimited("too much."), 429, "rate_limit_exceeded"),
        (RequestInvalid("no."), 400, "invalid_prompt"),
    ],
)
async def test_a_fault_on_the_way_ends_the_stream(
    api: ScriptedApi, fault: Exception, status: int, code: str
) -> None:
    """A whole answer has its status instead; a stream that has begun ends with the failed response, once."""
    api.service.say("A|h", failure=fault)
    assert (await api.post(PATH, **FIELDS)).status_code == status
    api.service.say("A|h", failure=fault)
    streamed = await api.post(PATH, **FIELDS, stream=True)
    assert streamed.status_code == 200
    last = check_events(read_stream(streamed.content))
    assert (last["status"], last["error"]["code"]) == ("failed", code)
    assert last["error"]["message"] == str(fault)
    assert _role_and_text(last["output"][0]) == ["message", "Ah"]
