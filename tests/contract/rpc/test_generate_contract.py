"""What the gRPC contract offers for a request, from our clients to a tiny model and back."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer, register
from inference_service.startup.load import Ready
from loramux import AsyncClient, Client, FinishReason, PromptLogprobs, Started, faults
from loramux.records import Delta, Finished
from loramux_shared.rpc.server import RpcServer
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import make_world

TEMPLATE = """{% for m in messages %}<{{ m.role }}{% if m.name %}/{{ m.name }}{% endif %}:
{{- m.content if m.content is not none else 'nothing' }}
{%- for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.at }}){% endfor %}
{%- if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}>{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}!{% endif %}"""
PROMPT = [5, 6, 7, 8]
SAMPLED: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    world, store = make_world(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048), MemoryStore()
    (world.base / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    world.build(store)
    return world.load(store, stream_interval_ms=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(ready: Ready) -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: partial(register, InferenceServicer(ready.service))})
    address = await server.start()
    ready.engine.start()
    await server.set_serving(True)
    yield address
    await server.drain(5)
    await ready.engine.stop()


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_n_answers_are_choices(address: str) -> None:
    """Both clients return the n answers in order, the first one as the completion's own."""
    async with AsyncClient(address) as client:
        alone = await client.complete("base", PROMPT, **SAMPLED)
        several = await client.complete("base", PROMPT, n=3, **SAMPLED)
    assert len(several.choices) == 3
    assert several.token_ids == several.choices[0].token_ids == alone.token_ids
    assert len({choice.token_ids for choice in several.choices}) == 3
    assert all(choice.usage.completion_tokens == 6 for choice in several.choices)
    with Client(address) as sync:
        again = await asyncio.to_thread(sync.complete, "base", PROMPT, n=3, **SAMPLED)
    assert again.choices == several.choices


async def test_events_carry_their_index(address: str) -> None:
    """One Started, and per answer its deltas and one Finished."""
    async with AsyncClient(address) as client:
        events = [event async for event in client.generate("all", PROMPT, n=2, **SAMPLED)]
    assert [event.index for event in events if isinstance(event, Finished)] in ([0, 1], [1, 0])
    assert {event.index for event in events if isinstance(event, Delta)} == {0, 1}
    assert sum(isinstance(event, Started) for event in events) == 1


async def test_long_prompts_are_scored_in_several_messages(address: str, ready: Ready) -> None:
    """All tokens come with the bytes they stand for, the first without a log probability."""
    prompt = [3 + (7 * place) % 190 for place in range(1500)]
    async with AsyncClient(address) as client:
        events = [event async for event in client.generate("base", prompt, prompt_logprobs=2, max_tokens=0)]
        completion = await client.complete("base", prompt, prompt_logprobs=2, max_tokens=0)
    assert sum(isinstance(event, PromptLogprobs) for event in events) == 2
    assert [token.token_id for token in completion.prompt] == prompt
    assert completion.prompt[0].logprobs is None
    for token in completion.prompt[1:]:
        assert token.logprobs is not None
        assert math.isfinite(token.logprobs.logprob)
        assert token.logprobs.token == ready.service.text.token_bytes(token.token_id)
        assert len(token.logprobs.top) == len(token.logprobs.top_tokens) == 2
        listed = token.token_id in (number for number, _ in token.logprobs.top)
        assert (token.logprobs.rank <= 2) == listed
    assert completion.token_ids == ()
    assert completion.reason is FinishReason.LENGTH


async def test_logprobs_come_with_bytes(address: str, ready: Ready) -> None:
    """The tokens of an answer and their alternatives say what they stand for."""
    async with AsyncClient(address) as client:
        completion = await client.complete("base", PROMPT, logprobs=3, **SAMPLED)
    for token, item in zip(completion.token_ids, completion.logprobs, strict=True):
        assert item.token == ready.service.text.token_bytes(token)
        assert item.top_tokens == tuple(ready.service.text.token_bytes(token) for token, _ in item.top)


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
        ({"json_schema": {"enum": ["a", "b"]}}, lambda text: json.loads(text) in ("a", "b")),
        ({"json_schema": '{"type": "boolean"}'}, lambda text: text in ("true", "false")),
        ({"regex": "[xy]{4}"}, lambda text: len(text) == 4 and not set(text) - {"x", "y"}),
        ({"lark": 'start: "a" "b"?'}, lambda text: text in ("a", "ab")),
    ],
)
async def test_constraints_reach_the_model(address: str, options: dict[str, Any], valid: Any) -> None:
    """Each kind of constraint shapes the answer."""
    closing = {3 + ord(char) - 32: 6.0 for char in '"}:'}
    async with AsyncClient(address) as client:
        completion = await client.complete(
            "base", PROMPT, n=4, temperature=1.0, seed=1, max_tokens=200, logit_bias=closing, **options
        )
    stopped = [choice.text for choice in completion.choices if choice.reason is FinishReason.STOP]
    assert stopped
    assert all(map(valid, stopped))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "("}, "response_format"),
        ({"n": 129}, "n"),
        ({"min_p": 2.0}, "min_p"),
        ({"logit_bias": {5000: 1.0}}, "logit_bias"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_what_the_server_refuses_is_named(address: str, options: dict[str, Any], named: str) -> None:
    """A bad option comes back as the field's name, through the status of the call."""
    async with AsyncClient(address) as client:
        with pytest.raises(faults.RequestInvalid) as caught:
            await client.complete("base", PROMPT, **options)
    assert [finding.where for finding in caught.value.findings] == [named]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "a", "json_object": True}, "constraint"),
        ({"lark": 3}, "constraint"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"n": -1}, "n"),
    ],
)
async def test_what_cannot_be_sent_is_named(address: str, options: dict[str, Any], named: str) -> None:
    """What fits no field is refused before it is sent."""
    with Client(address) as client, pytest.raises(faults.RequestInvalid) as caught:
        client.complete("base", PROMPT, **options)
    assert [finding.where for finding in caught.value.findings] == [named]


CALL = {"id": "7", "function": {"name": "f", "arguments": '{"at": 3}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


async def test_messages_and_tools_reach_the_template(address: str, ready: Ready) -> None:
    """Names, calls, answers of tools and tools are rendered as they were given."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"at": "x"}}}]},
        {"role": "tool", "content": "4", "tool_call_id": "7"},
    ]
    turns = "<user/Ada:hi><assistant:nothingf(3)><assistant:nothingg(x)><tool:4#7>"
    async with AsyncClient(address) as client:
        for options, rendered in (
            ({}, turns + "!"),
            ({"add_generation_prompt": False}, turns),
            ({"tools": [TOOL]}, turns + json.dumps([TOOL]) + "!"),
        ):
            completion = await client.complete(
                "base",
                messages,
                max_tokens=0,
                prompt_logprobs=0,
                **options,  # type: ignore[typeddict-item]
            )
            tokens = [token.token_id for token in completion.prompt]
            assert ready.service.text.decode(tokens) == rendered


async def test_arguments_that_are_no_object_are_refused(address: str) -> None:
    """The arguments of a call are a JSON object, and so are the parameters of a tool."""
    broken = {"function": {"name": "f", "arguments": "[1]"}}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"tool_calls": [broken]}, {}, "messages.messages[0].tool_calls.arguments"),
        (
            {"content": "x"},
            {"tools": [{"function": {"name": "f", "parameters": "{"}}]},
            "messages.tools[0].parameters",
        ),
    ]
    async with AsyncClient(address) as client:
        for turn, options, named in cases:
            with pytest.raises(faults.RequestInvalid) as caught:
                await client.complete("base", [{"role": "assistant", **turn}], **options)
            assert [finding.where for finding in caught.value.findings] == [named]


async def test_prompts_beyond_the_message_cap_are_refused(address: str) -> None:
    """A message that is too large is an error of its own call; the next one is answered."""
    async with AsyncClient(address) as client:
        with pytest.raises(faults.Fault):
            await client.complete("base", "x" * 20_000_000)
        assert (await client.complete("base", PROMPT, **SAMPLED)).usage.completion_tokens == 6


async def test_masks_and_stops_reach_the_draw(address: str) -> None:
    """Allowed tokens, bad words and kept stop texts do here what they do over HTTP."""
    allowed: dict[str, Any] = {"max_tokens": 30, "temperature": 50.0, "seed": 3, "allowed_token_ids": [36, 37]}
    async with AsyncClient(address) as client:
        free = await client.complete("base", PROMPT, **allowed)
        assert set(free.text) == {"A", "B"}
        assert "AB" in free.text
        tamed = await client.complete("base", PROMPT, **allowed, bad_words="AB")
        assert "AB" not in tamed.text
        assert "BA" in tamed.text
        kept = await client.complete("base", PROMPT, **allowed, stop="BA", include_stop_str_in_output=True)
        assert (kept.text, kept.stop_text) == (free.text[: free.text.index("BA") + 2], "BA")
        with pytest.raises(faults.RequestInvalid) as caught:
            await client.complete("base", PROMPT, **allowed, bad_words=["A", "B"])
    assert [finding.where for finding in caught.value.findings] == ["allowed_token_ids"]


async def test_prompts_are_cut_salted_and_gone_on_with(address: str) -> None:
    """What a request says of its prompt beside the prompt itself, as over HTTP."""
    async with AsyncClient(address) as client:
        with pytest.raises(faults.PromptTooLong):
            await client.complete("base", [5] * 3000, max_tokens=2)
        cut = await client.complete("base", [5] * 3000, max_tokens=2, truncate_prompt_tokens=-1)
        assert cut.started.prompt_tokens == 2046
        cached = [
            (await client.complete("base", PROMPT * 30, max_tokens=1, cache_salt=salt)).usage.cached_tokens > 0
            for salt in (None, "a", "a", "b", None)
        ]
        assert cached == [False, False, True, False, True]
        turns = [{"role": "assistant", "content": "So"}]
        goes_on = await client.complete(
            "base", turns, **SAMPLED, add_generation_prompt=False, continue_final_message=True
        )
        assert goes_on.token_ids == (await client.complete("base", "<assistant:So", **SAMPLED)).token_ids
        for name, value in (("truncate_prompt_tokens", 0), ("cache_salt", "x" * 257)):
            with pytest.raises(faults.RequestInvalid) as caught:
                await client.complete("base", PROMPT, **{name: value})  # type: ignore[arg-type]
            assert [finding.where for finding in caught.value.findings] == [name]
        with pytest.raises(faults.PromptTooLong):
            await client.complete("base", [5] * 140_000, truncate_prompt_tokens=4)
