"""Anthropic's API through Anthropic's own client, with a tiny real model or a script behind it.

The client takes longer to import than these tests, so that only the worker that runs them does.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio

from inference_service.api.http.anthropic.mapping import chat_of
from inference_service.api.http.anthropic.messages import MessageAnswer
from inference_service.api.http.anthropic.schema import MessagesBody
from inference_service.api.http.app import create_app
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.runtime import ReasoningParser
from tests.contract.http.scripted_service import ScriptedService, open_scripted
from tests.support.access import lines, new_entry
from tests.support.cases import cases
from tests.support.generations import change_deployed
from tests.support.openai_api import OpenAIApi
from tests.support.waiting import BOUND_S
from tests.support.web import web_client

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.whole]

USER: Any = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {"temperature": 0}
"""The client has no names for sampling any more."""
FIELDS: dict[str, Any] = {"model": "rs", "messages": USER, "max_tokens": 8, "extra_body": GREEDY}
SENT: dict[str, Any] = {"model": "pirate", "messages": USER, "max_tokens": 8}
COLOR = {"properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
SCHEMA = COLOR | {"type": "object", "additionalProperties": False}
PAINT: Any = {"name": "Paint", "description": "Paint something.", "input_schema": SCHEMA}
KINDS = ("thinking", "signature", "text", "input_json")
"""Events that the client makes of a stream's deltas."""
SECRET, ENTRY = new_entry("ann", "infer")
METRICS, METRICS_ENTRY = new_entry("bob", "metrics")


def _client(**how: Any) -> AsyncAnthropic:
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(**how)


def _refused(kind: str) -> pytest.RaisesExc[Any]:
    import anthropic

    return pytest.raises(getattr(anthropic, kind))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def claude(opened: OpenAIApi) -> AsyncIterator[AsyncAnthropic]:
    """A client of the tiny model's API."""
    async with _client(base_url=opened.url, api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def scripted(
    folder: Path, guard: Guard = NOBODY_GUARDS
) -> AsyncIterator[tuple[ScriptedService, AsyncAnthropic]]:
    """A server in front of a script, and a client of it."""
    async with (
        open_scripted(folder, guard) as api,
        _client(base_url=api.url, api_key=SECRET, max_retries=0) as client,
    ):
        yield api.service, client


async def test_an_answer(claude: AsyncAnthropic, api: OpenAIApi) -> None:
    """A message has its model, its stop reason and its usage."""
    answer = await claude.messages.create(**FIELDS, system="Be brief.")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "rs")
    assert answer.id.startswith("msg_")
    assert answer.stop_reason in ("end_turn", "max_tokens")
    [block] = answer.content
    assert block.type == "text"
    assert block.text
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len("s:Be brief.;u:Hi;a:")
    chat = await api.openai.chat.completions.create(
        model="rs", messages=[{"role": "system", "content": "Be brief."}, *USER], max_tokens=8, temperature=0
    )
    assert chat.choices[0].message.content == block.text


async def test_models(claude: AsyncAnthropic) -> None:
    """The client lists models, and finds one by name."""
    assert [model.id async for model in claude.models.list()] == ["base", "all", "rs", "wide"]
    model = await claude.models.retrieve("rs")
    assert (model.type, model.display_name, model.created_at.tzinfo is not None) == ("model", "rs", True)
    with _refused("NotFoundError"):
        await claude.models.retrieve("nope")


async def test_what_is_counted_is_what_is_used(claude: AsyncAnthropic) -> None:
    """count_tokens counts messages, tools and system as a request would be charged for them."""
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "Paint", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "ok"}]},
        {"role": "assistant", "content": "It is"},
    ]
    fields: dict[str, Any] = {"model": "wide", "messages": turns, "system": "S", "tools": [PAINT]}
    counted = await claude.messages.count_tokens(**fields)
    used = (await claude.messages.create(**fields, max_tokens=1)).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
    assert counted.input_tokens == len('[Paint]s:S;u:a\nb;a:(Paint{"x": 1});t:ok;a:It is')
    long = await claude.messages.count_tokens(model="base", messages=[{"role": "user", "content": "x" * 5000}])
    assert long.input_tokens == 5000 + len("u:;a:")


async def test_stops_and_what_they_are_called(claude: AsyncAnthropic) -> None:
    """A stop sequence is named, and is not in the text."""
    whole = (await claude.messages.create(**FIELDS)).content[0].text
    stop = whole[1]
    answer = await claude.messages.create(**FIELDS, stop_sequences=["~~~", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in answer.content) == whole.partition(stop)[0]


async def test_a_demanded_call_is_made_and_answered(claude: AsyncAnthropic) -> None:
    """The input keeps to the schema, streamed too; its result goes back as the client has it."""
    demanded = FIELDS | {"max_tokens": 100, "tools": [PAINT]}
    answer = await claude.messages.create(**demanded, tool_choice={"type": "any"})
    [call] = answer.content
    assert call.type == "tool_use"
    assert (call.name, answer.stop_reason) == ("Paint", "tool_use")
    assert call.input["color"] in ("red", "blue")
    async with claude.messages.stream(**demanded, tool_choice={"type": "tool", "name": "Paint"}) as stream:
        parts = [event.partial_json async for event in stream if event.type == "input_json"]
        final = await stream.get_final_message()
    assert json.loads("".join(parts)) == final.content[0].input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "ok"}]}
    turns = [*USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    used = (await claude.messages.create(**FIELDS | {"messages": turns}, tools=[PAINT])).usage
    prompt = f"[Paint]u:Hi;a:(Paint{json.dumps(call.input)});t:ok;a:"
    assert used.input_tokens + (used.cache_read_input_tokens or 0) == len(prompt)


@pytest.mark.parametrize(
    ("fields", "kind", "expected"),
    [
        *cases(__file__, "test_refusals_are_the_clients_own"),
        (
            {"messages": [{"role": "user", "content": "x" * 300}]},
            "BadRequestError",
            "prompt is too long: 305 tokens > 255 maximum",
        ),
    ],
)
async def test_refusals_are_the_clients_own(
    claude: AsyncAnthropic, fields: dict[str, Any], kind: str, expected: str
) -> None:
    """A refusal is of the client's class, with a type, the request's id and the names that were sent."""
    for stream in (False, True):
        with _refused(kind) as caught:
            await claude.messages.create(**FIELDS | fields, stream=stream)
        body: Any = caught.value.body
        assert expected in body["error"]["message"]
        assert body["request_id"] == caught.value.request_id
        assert caught.value.type == ("not_found_error" if kind == "NotFoundError" else "invalid_request_error")


async def test_a_replica_that_drains_is_overloaded(api: OpenAIApi) -> None:
    """A replica that drains says so in the form of this API."""
    app = create_app(api.ready.service)
    app.draining = True
    async with web_client(app) as web:
        answer = await web.post("/v1/messages", json=SENT)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")


async def test_keys_come_in_either_header(tmp_path: Path) -> None:
    """Keys come in today's header or the former; a missing one is a fault in Anthropic's shape."""
    async with scripted(tmp_path, Guard(Keyring(text=lines(ENTRY, METRICS_ENTRY)))) as (service, client):
        service.say("Ahoy!", "Ahoy!")
        assert (await client.messages.create(**SENT)).content[0].text == "Ahoy!"
        async with httpx.AsyncClient(base_url=str(client.base_url), timeout=BOUND_S) as web:
            answers = [
                await web.post("/v1/messages", json=SENT, headers=headers)
                for headers in ({"x-api-key": SECRET}, {"x-api-key": METRICS}, {"x-api-key": "lmx_no"}, {})
            ]
        assert [answer.status_code for answer in answers] == [200, 403, 401, 401]
        kinds = [answer.json()["error"]["type"] for answer in answers[1:]]
        assert kinds == ["permission_error", *["authentication_error"] * 2]
        with _refused("AuthenticationError"):
            await client.with_options(api_key="lmx_wrong").messages.create(**SENT)


async def test_a_stream_that_tells_nothing_is_alive(tmp_path: Path) -> None:
    """A stream has tokens and pings while a call is held back."""
    body = MessagesBody.model_validate_json(json.dumps(SENT | {"tools": [PAINT], "stream": True}))
    async with scripted(tmp_path) as (service, _):
        kinds = []
        for patience_s in (60.0, 0.0):
            service.say('<tool_call>|{"na|me": |"Paint", "arguments": {}}</tool_call>')
            answer = MessageAnswer(service, body, chat_of(body), patience_s)
            kinds.append([event["type"] async for event in answer.events()])
    patient, hasty = kinds
    assert patient.count("ping") == 1 < hasty.count("ping")
    assert [kind for kind in hasty if kind != "ping"] == [kind for kind in patient if kind != "ping"]


async def test_what_is_thought_comes_apart(tmp_path: Path) -> None:
    """A block before the text, with a signature and its price; without its text where that is not wanted."""
    stated = "<think>I |look.</think>|The |sky."
    async with scripted(tmp_path) as (service, client):
        change_deployed(service.local.catalog, reasoning_parser=ReasoningParser.THINK)
        service.say(stated, stated)
        async with client.messages.stream(**SENT, thinking={"type": "enabled", "budget_tokens": 9}) as stream:
            kinds = list(dict.fromkeys([event.type async for event in stream if event.type in KINDS]))
            thinking, text = (await stream.get_final_message()).content
        hidden = await client.messages.create(**SENT, thinking={"type": "adaptive", "display": "omitted"})
        variables = service.asked[0].prompt.chat_template_kwargs
    assert kinds == ["thinking", "signature", "text"]
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "I look.", "The sky.")
    assert thinking.signature == hidden.content[0].signature != ""
    assert hidden.content[0].thinking == ""
    assert hidden.content[1].text == "The sky."
    details = hidden.usage.output_tokens_details
    assert len("I look.") <= details.thinking_tokens < hidden.usage.output_tokens
    assert variables == {"enable_thinking": True, "thinking": True}


async def test_the_clients_tool_runner_runs_tools(tmp_path: Path) -> None:
    """The tool runner works without a thread on the server, which refuses threads, and sends results back."""

    from anthropic import beta_async_tool

    @beta_async_tool
    async def look(place: str) -> str:
        """Look somewhere.

        Args:
            place: Where.
        """
        return f"{place} is blue"

    async with scripted(tmp_path) as (service, client):
        service.say('<tool_call>{"name": "look", "arguments": {"place": "sky"}}</tool_call>', "It is blue.")
        runner = client.beta.messages.tool_runner(
            model="pirate",
            max_tokens=50,
            messages=USER,
            tools=[look],
            betas=["interleaved-thinking-2025-05-14"],
        )
        last = await runner.until_done()
    assert last.content[0].text == "It is blue."
    assert [message["role"] for message in service.asked[-1].prompt.content] == ["user", "assistant", "tool"]
    assert service.asked[-1].prompt.content[-1]["content"] == "sky is blue"
