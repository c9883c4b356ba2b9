"""OpenAI's API through OpenAI's own client, with a tiny real model behind it."""

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pytest
import pytest_asyncio
from openai import pydantic_function_tool
from pydantic import BaseModel

from loramux_shared.storage.memory import MemoryStore
from tests.support.openai_api import OpenAIApi, open_api
from tests.support.tiny import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER: Any = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {"model": "rs", "messages": USER, "temperature": 0, "extra_body": {"ignore_eos": True}}


class Paint(BaseModel):
    """Paint something."""

    color: Literal["red", "blue"]


class Wait(BaseModel):
    """Wait a while."""

    long: bool


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(world: tuple[World, MemoryStore], api_processes: int) -> AsyncIterator[OpenAIApi]:
    """A server that the tests of a module share, of each kind."""
    async with open_api(world) as api:
        yield api


async def test_models(api: OpenAIApi) -> None:
    """The client lists models, and one that is not served is an exception with its code."""
    assert [model.id async for model in api.openai.models.list()] == ["base", "all", "rs", "wide"]
    with pytest.raises(openai.NotFoundError) as caught:
        await api.openai.models.retrieve("org/nope:1")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_tokens_are_called_by_their_ids_where_that_is_asked_for(api: OpenAIApi) -> None:
    """Token ids are in a chat and in a plain completion, as trainers read them."""
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
    ids = {"temperature": 0, "max_tokens": 3, "extra_body": extra}
    requests = {"model": "all", "messages": USER, "logprobs": True, "top_logprobs": 1}
    chat = await api.openai.chat.completions.create(**requests, **ids)
    choice = chat.choices[0]
    expected = [f"token_id:{token}" for token in choice.model_extra["token_ids"]]
    assert [each.token for each in choice.logprobs.content or ()] == expected
    assert [each.top_logprobs[0].token for each in choice.logprobs.content or ()] == expected
    plain = (await api.openai.completions.create(model="all", prompt="HI", logprobs=1, **ids)).choices[0]
    expected = [f"token_id:{token}" for token in plain.model_extra["token_ids"]]
    assert plain.logprobs.tokens == expected
    assert [next(iter(each)) for each in plain.logprobs.top_logprobs or ()] == expected


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"Paint", "Wait"}), ({"type": "function", "function": {"name": "Wait"}}, {"Wait"})],
)
async def test_a_demanded_call_is_made(api: OpenAIApi, choice: Any, names: set[str]) -> None:
    """Required and named choices give a call whose arguments keep to the schema, streamed too."""
    tools = [pydantic_function_tool(Paint), pydantic_function_tool(Wait)]
    options = GREEDY | {"extra_body": None, "max_tokens": 200, "tools": tools, "tool_choice": choice}
    answer = await api.openai.chat.completions.parse(**options)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls
    [call] = message.tool_calls
    assert call.function.name in names
    assert isinstance(call.function.parsed_arguments, Paint | Wait)
    async with api.openai.chat.completions.stream(**options) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.tool_calls
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


async def test_a_conversation_with_tools_goes_on(api: OpenAIApi) -> None:
    """Messages that a client sends back, its own message objects included, are rendered by the template."""
    tools: Any = [pydantic_function_tool(Wait)]
    first = await api.openai.chat.completions.create(
        **GREEDY | {"extra_body": None, "max_tokens": 100}, tools=tools, tool_choice="required"
    )
    message = first.choices[0].message
    call = message.tool_calls[0]
    turns: Any = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "ok"}]
    second = await api.openai.chat.completions.create(
        **GREEDY | {"messages": turns}, max_tokens=2, tools=tools, tool_choice="auto"
    )
    arguments = json.dumps(json.loads(call.function.arguments))
    assert second.usage.prompt_tokens == len(f"[Wait]u:Hi;a:(Wait{arguments});t:ok;a:")
    without = await api.openai.chat.completions.create(**GREEDY, max_tokens=2, tools=tools, tool_choice="none")
    assert without.usage.prompt_tokens == len("u:Hi;a:")


async def test_a_schema_that_cannot_be_followed_is_named(api: OpenAIApi) -> None:
    """The parameter is the one that holds the schema."""
    schema: Any = {"type": "object", "properties": {"x": {"type": "nonsense"}}}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    expected: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for fields, param in (
        ({"tools": tools, "tool_choice": "required"}, "tools"),
        ({"response_format": expected}, "response_format"),
    ):
        for stream in (True, False):
            with pytest.raises(openai.BadRequestError) as caught:
                await api.openai.chat.completions.create(
                    **GREEDY | {"extra_body": None}, **fields, stream=stream
                )
            assert (caught.value.param, caught.value.code) == (param, "invalid_schema")
            assert "Invalid type: nonsense" in caught.value.message
            assert "\n" not in caught.value.message


async def test_an_evaluation_harness_scores_a_continuation(api: OpenAIApi) -> None:
    """An echo without new tokens has a log probability for each token of the prompt but the first."""
    prompt, options = [40, 41, 42, 43], {"model": "rs", "echo": True, "logprobs": 1, "temperature": 0}
    answer = await api.openai.completions.create(prompt=prompt, max_tokens=0, **options)
    scores, text = answer.choices[0].logprobs, api.ready.service.text
    assert answer.choices[0].text == text.decode(prompt)
    assert scores.tokens == [text.token_text(token) for token in prompt]
    assert [score is None for score in scores.token_logprobs] == [True, False, False, False]


async def test_plain_prompts_stream(api: OpenAIApi) -> None:
    """Answers of several prompts come mixed in a stream, and add up to the whole by their indices."""
    options: dict[str, Any] = {"model": "wide", "prompt": ["AB", "CD"], "n": 2, "max_tokens": 6, "echo": True}
    options |= {"seed": 3, "extra_body": {"ignore_eos": True}}
    whole = await api.openai.completions.create(**options)
    texts = ["", "", "", ""]
    reasons: list[str | None] = [None] * 4
    usage = None
    async for chunk in await api.openai.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert [text[:2] for text in texts] == ["AB", "AB", "CD", "CD"]
    assert reasons == ["length"] * 4
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 24)
    assert usage.total_tokens == whole.usage.total_tokens


async def test_prompt_logprobs_come_in_vllms_shape(api: OpenAIApi) -> None:
    """Prompt log probabilities have an entry per token of the prompt, by token id, null for the first."""
    options: dict[str, Any] = {"max_tokens": 1, "extra_body": {"prompt_logprobs": 1}}
    completion = await api.openai.completions.create(model="base", prompt=[40, 41], **options)
    first, second = completion.choices[0].model_extra["prompt_logprobs"]
    assert first is None
    assert list(second["41"]) == ["logprob", "rank", "decoded_token"]
    assert second["41"]["decoded_token"] == api.ready.service.text.token_text(41)
    best = next(iter(second.keys() - {"41"}), "41")
    assert second[best]["rank"] == 1
    assert (second["41"]["rank"] == 1) == (best == "41")
    chat = await api.openai.chat.completions.create(model="base", messages=USER, **options)
    assert len(chat.model_extra["prompt_logprobs"]) == len("u:Hi;a:")


async def test_what_stopped_an_answer_is_reported(api: OpenAIApi) -> None:
    """A stop text, a stop token's id, or null: vLLM's `stop_reason`, beside every `finish_reason`."""
    whole = await api.openai.chat.completions.create(**GREEDY, max_tokens=4)
    text = whole.choices[0].message.content or ""
    ending: dict[str, Any] = {"logit_bias": {"2": 100}}
    for request, expected in (
        ({}, ("length", None)),
        ({"stop": text[2:]}, ("stop", text[2:])),
        (ending | {"extra_body": {}}, ("stop", None)),
        (ending | {"extra_body": {"stop_token_ids": [2]}}, ("stop", None)),
        (ending | {"extra_body": {"stop_token_ids": [2], "ignore_eos": True}}, ("stop", 2)),
    ):
        options = GREEDY | {"max_tokens": 4} | request
        plain = {name: value for name, value in options.items() if name != "messages"}
        for create, prompted in (
            (api.openai.chat.completions.create, options),
            (api.openai.completions.create, plain | {"prompt": "u:Hi;a:"}),
        ):
            answer = await create(**prompted)
            *before, last = [chunk.choices[0] async for chunk in await create(stream=True, **prompted)]
            assert _end(answer.choices[0]) == _end(last) == expected
            assert {_end(choice) for choice in before} <= {(None, None)}


def _end(choice: Any) -> tuple[str | None, str | int | None]:
    return choice.finish_reason, choice.model_extra["stop_reason"]


async def test_a_response_to_too_much_begins_later(api: OpenAIApi) -> None:
    """As few first turns as possible are left out where allowed, never instructions nor half a turn."""
    most = api.ready.service.limits.max_seq_len
    turns: list[Any] = []
    for nth in range(40):
        turns += [{"role": "user", "content": f"{nth:02}"}, {"role": "assistant", "content": "y" * 8}]
    requests: Any = {"model": "rs", "instructions": "I", "input": [*turns, USER[0]], "max_output_tokens": 9}
    with pytest.raises(openai.BadRequestError) as caught:
        await api.openai.responses.create(**requests)
    assert caught.value.code == "context_length_exceeded"
    answer = await api.openai.responses.create(**requests, truncation="auto")
    assert answer.truncation == "auto"
    turn, rest = len("u:00;a:yyyyyyyy;"), len("s:I;u:Hi;a:")
    assert answer.usage.input_tokens == rest + turn * ((most - 9 - rest) // turn)
    with pytest.raises(openai.BadRequestError):
        await api.openai.responses.create(model="rs", input="x" * most, truncation="auto")
