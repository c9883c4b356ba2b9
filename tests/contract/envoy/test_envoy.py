"""Scripted replicas behind the real Envoy, with the configuration that `loramux envoy` prints."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
import pytest_asyncio

from loramux.faults import ServerUnavailable, ShuttingDown
from loramux.inference.v1 import inference_pb2 as pb
from tests.support.scripted_fleet import Fleet, behind_envoy
from tests.support.scripted_replica import MODELS

GENERATE = "/loramux.inference.v1.InferenceService/Generate"


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Three replicas behind Envoy."""
    async with behind_envoy(Fleet(tmp_path)) as made:
        yield made


async def test_a_model_stays_with_its_replica(fleet: Fleet) -> None:
    """One replica answers a model at both doors, whoever asks, and models are spread over all replicas."""
    seen = {model: {await fleet.who_over_http(model)} for model in MODELS}
    assert set.union(*seen.values()) == set(fleet.replicas)
    async with grpc.aio.insecure_channel(fleet.proxy.grpc) as channel:
        generate = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)
        for model in MODELS[:6] * 2:
            seen[model].add(await fleet.who(model))
            chat = await fleet.openai.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "A long story. " * 10_000}]
            )
            seen[model].add(chat.choices[0].message.content)
            request = pb.GenerateRequest(model=model, text="HELLO").SerializeToString()
            texts = [message.delta.text async for message in generate(request)]
            seen[model].add("".join(texts))
    assert all(len(replicas) == 1 for replicas in seen.values()), seen


async def test_the_header_comes_before_the_body(fleet: Fleet) -> None:
    """A client that names the model in `x-loramux-model` decides who answers, at both doors."""
    wanted = await fleet.who("lora1")
    [other, *_] = [model for model in MODELS if await fleet.who(model) != wanted]
    headers = {"x-loramux-model": "lora1"}
    answer = await fleet.web.post("/v1/completions", json={"model": other, "prompt": "HELLO"}, headers=headers)
    assert answer.json()["choices"][0]["text"] == wanted
    async with grpc.aio.insecure_channel(fleet.proxy.grpc) as channel:
        generate = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)
        request = pb.GenerateRequest(model=other, text="HELLO").SerializeToString()
        call = generate(request, metadata=tuple(headers.items()))
        assert "".join([message.delta.text async for message in call]) == wanted


async def test_a_popular_model_spreads(fleet: Fleet) -> None:
    """No replica has much more than the mean of what is under way, though all of it is for one model."""
    streams = [fleet.client.generate("base", "WAIT") for _ in range(24)]
    said = [[await anext(stream), await anext(stream)][1] for stream in streams]
    assert max(Counter(delta.text for delta in said).values()) <= 1.25 * 24 / 3 + 1
    for stream in streams:
        await stream.aclose()


async def test_what_most_ask_for_has_several_places(fleet: Fleet) -> None:
    """As many as there are replicas; another model keeps its one. What clients say of places is not heeded."""
    for model in MODELS:
        await fleet.who_over_http(model)
    headers = {"x-loramux-place": "mine"}
    for model in (["base"] * 60 + ["lora1"]) * 10:
        await fleet.web.post("/v1/completions", json={"model": model, "prompt": "HELLO"}, headers=headers)
    answer = await fleet.web.get("/v1/models", headers=headers)
    assert not [name for name in answer.headers if name.startswith("x-loramux")]
    lines = await asyncio.to_thread(fleet.proxy.requests, len(MODELS) + 611)
    homes: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        homes.setdefault((line["model"], line["place"]), set()).add(line["replica"])
    assert {place for model, place in homes if model == "base"} == {"base", "base 2", "base 3"}
    assert {place for model, place in homes if model != "base"} == {None, *MODELS[1:]}
    assert all(len(replicas) == 1 for replicas in homes.values())


async def test_a_replica_without_tokens_is_left(fleet: Fleet) -> None:
    """What it has not begun is answered elsewhere, at both doors, and it gets no more, for all its health."""
    slow = fleet.replicas[await fleet.who("lora1")]
    slow.service.tokens.clear()
    before = slow.service.asked
    answers = await asyncio.gather(
        *(fleet.who("lora1") for _ in range(3)),
        *(_streamed(fleet, "lora1") for _ in range(3)),
    )
    assert slow.service.name not in answers
    asked = slow.service.asked
    assert asked > before
    assert slow.service.open == 0
    assert [await fleet.who("lora1"), await _streamed(fleet, "lora1")] == [answers[0]] * 2
    assert slow.service.asked == asked


async def _streamed(fleet: Fleet, model: str) -> str:
    stream = await fleet.openai.completions.create(model=model, prompt="HELLO", stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream])


async def test_a_long_answer_that_is_not_streamed_waits(fleet: Fleet) -> None:
    """Its headers come with its last token, so no time for a first token is set for it."""
    slow = fleet.replicas[await fleet.who("lora1")]
    asking = asyncio.create_task(fleet.who_over_http("lora1", stream=False))
    slow.service.tokens.clear()
    await asyncio.sleep(1.5)  # longer than a stream may wait here
    slow.service.tokens.set()
    assert await asking == slow.service.name


async def test_a_replica_that_leaves_is_left_in_peace(fleet: Fleet) -> None:
    """Without health it keeps its streams and gets no more; once it refuses, nobody notices."""
    leaving = fleet.replicas[await fleet.who("lora1")]
    stream = fleet.client.generate("lora1", "WAIT")
    assert [(await anext(stream)).model, (await anext(stream)).text] == ["lora1", leaving.service.name]
    await leaving.leave()
    assert (await fleet.who("lora1"), leaving.service.open) == (leaving.service.name, 1)
    await fleet.until_healthy(4)
    assert await fleet.who("lora1") != leaving.service.name
    assert await fleet.who_over_http("lora1") != leaving.service.name
    await leaving.grpc.refuse()
    leaving.service.ends.set()
    assert [type(event).__name__ async for event in stream] == ["Finished"]


async def test_what_is_refused_is_asked_elsewhere(fleet: Fleet) -> None:
    """A replica that drains before Envoy knows it: its refusal reaches nobody, however large the request."""
    draining = fleet.replicas[await fleet.who("lora1")]
    draining.service.refuses = ShuttingDown("the server is shutting down.")
    large = {"model": "lora1", "prompt": "A" * 6_000_000}
    answer = await fleet.web.post("/v1/completions", json=large)
    others = {answer.json()["choices"][0]["text"], (await fleet.client.complete("lora1", large["prompt"])).text}
    assert draining.service.name not in others
    assert [each["attempts"] for each in await asyncio.to_thread(fleet.proxy.requests, 3)] == [1, 2, 2]


async def test_without_replicas_errors_have_names(fleet: Fleet) -> None:
    """When no replica is well, clients are told so in the words of their door, at once."""
    for replica in fleet.replicas.values():
        await replica.leave()
    await fleet.until_healthy(0)
    with pytest.raises(ServerUnavailable, match="no healthy upstream"):
        await fleet.who("lora1")
    answer = await fleet.web.post("/v1/completions", json={"model": "lora1", "prompt": "HELLO"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "server_unavailable")
    answer = await fleet.web.post("/v1/messages?beta=true", json={}, headers={"x-request-id": "mine-1"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    told = answer.json()
    assert (told["type"], told["error"]["type"], told["request_id"]) == ("error", "overloaded_error", "mine-1")


async def test_what_all_refuse_keeps_its_reason(fleet: Fleet) -> None:
    """After the last try the client hears what a replica said, with a time to retry after."""
    for replica in fleet.replicas.values():
        replica.service.refuses = ShuttingDown("the server is shutting down.")
    with pytest.raises(ShuttingDown) as caught:
        await fleet.who("lora1")
    assert caught.value.retry_after_s is not None
    answer = await fleet.web.post("/v1/completions", json={"model": "lora1", "prompt": "HELLO"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


async def test_nothing_is_sent_before_the_first_token(fleet: Fleet) -> None:
    """Not even headers, at both doors: what began could not be asked elsewhere."""
    one = fleet.replicas["one"]
    one.service.tokens.clear()
    bodies = {
        "/v1/completions": {"prompt": "HELLO"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "HELLO"}]},
        "/v1/messages": {"messages": [{"role": "user", "content": "HELLO"}], "max_tokens": 8},
    }
    async with (
        grpc.aio.insecure_channel(one.grpc.address) as channel,
        httpx.AsyncClient(base_url=f"http://{one.http.address}") as web,
    ):
        call = channel.unary_stream(GENERATE)(
            pb.GenerateRequest(model="base", text="HELLO").SerializeToString()
        )
        requests = [
            web.build_request("POST", path, json={"model": "base", "stream": True} | body)
            for path, body in bodies.items()
        ]
        waits = [call.initial_metadata(), *(web.send(request, stream=True) for request in requests)]
        begun = [asyncio.ensure_future(wait) for wait in waits]
        async with asyncio.timeout(10):
            while one.service.open < len(begun):
                await asyncio.sleep(0.01)
        done, _ = await asyncio.wait(begun, timeout=0.1)
        assert not done
        one.service.tokens.set()
        await asyncio.gather(*begun)
        async for _ in call:
            pass


async def test_the_log_has_no_prompt(fleet: Fleet) -> None:
    """It says which replica answered which model, under the id that the client gave, and nothing of a text."""
    headers = {"x-request-id": "mine-1", "authorization": "Bearer lmx_secret"}
    body = {"model": "lora1", "prompt": "SECRET WORDS"}
    await fleet.web.post("/v1/completions?SECRET", json=body, headers=headers)
    [line] = await asyncio.to_thread(fleet.proxy.requests, 1)
    assert (line["request_id"], line["model"], line["attempts"]) == ("mine-1", "lora1", 1)
    assert line["replica"] in {replica.http.address for replica in fleet.replicas.values()}
    assert "SECRET" not in str(line).upper()
