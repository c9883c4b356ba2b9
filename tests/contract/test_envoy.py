"""Scripted replicas behind the real Envoy, with the configuration that `loramux envoy` prints."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from inference_service.openai_api import protocol
from loramux import AsyncClient
from loramux.envoy.fleet import Tls
from loramux.faults import ServerUnavailable, ShuttingDown
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.rpc import calls
from tests.support.access import Certificates, keyring
from tests.support.endless import Endless, doors_of
from tests.support.fleet import Proxy, fleet_of, until
from tests.support.scripted_replica import MODELS, ScriptedReplica

GENERATE = "/loramux.inference.v1.InferenceService/Generate"


class Fleet:
    """Three replicas, Envoy, and its clients."""

    def __init__(self, folder: Path, guard: Guard = NOBODY_GUARDS) -> None:
        self.replicas = {name: ScriptedReplica(folder, name, guard) for name in ("one", "two", "three")}
        self.folder = folder

    async def start(self, host: str = "127.0.0.1", tls: Tls | None = None) -> None:
        """Listen; Envoy finds the replicas by a name of this machine."""
        await asyncio.gather(*(replica.start() for replica in self.replicas.values()))
        doors = [
            tuple(door.replace("127.0.0.1", host) for door in each.doors) for each in self.replicas.values()
        ]
        self.proxy = Proxy(fleet_of(doors, first_token_s=1, tls=tls), self.folder)
        self.client = AsyncClient(self.proxy.grpc)
        self.web = httpx.AsyncClient(base_url=self.proxy.url, timeout=20)
        self.openai = AsyncOpenAI(base_url=f"{self.proxy.url}/v1", api_key="none", max_retries=0, timeout=20)
        await asyncio.to_thread(self.proxy.start)

    async def stop(self) -> None:
        """End everything."""
        for replica in self.replicas.values():
            replica.service.tokens.set()
            replica.service.ends.set()
        await self.client.close()
        await self.web.aclose()
        await self.openai.close()
        self.proxy.stop()
        await asyncio.gather(*(replica.drain() for replica in self.replicas.values()))

    async def until_healthy(self, doors: int) -> None:
        """Wait until so many doors get traffic."""
        await asyncio.to_thread(self.proxy.until_healthy, doors)
        await asyncio.sleep(0.1)  # for its threads to hear of it

    async def who(self, model: str) -> str:
        """The replica that answers a model over gRPC."""
        return (await self.client.complete(model, "HELLO")).text

    async def who_over_http(self, model: str, **more: object) -> str:
        """The same of OpenAI's API."""
        answer = await self.web.post("/v1/completions", json={"model": model, "prompt": "HELLO"} | more)
        return str(answer.json()["choices"][0]["text"])


@asynccontextmanager
async def behind_envoy(made: Fleet, **options: Any) -> AsyncIterator[Fleet]:
    """Start a fleet, and stop it."""
    try:
        await made.start(**options)
        yield made
    finally:
        await made.stop()


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Three replicas behind Envoy."""
    async with behind_envoy(Fleet(tmp_path)) as made:
        yield made


async def test_a_model_stays_with_its_replica(fleet: Fleet) -> None:
    """One replica answers a model at both doors, whoever asks, and models are spread over all replicas."""
    seen: dict[str, set[str]] = {model: set() for model in MODELS}
    async with grpc.aio.insecure_channel(fleet.proxy.grpc) as channel:
        generate = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)
        for model in MODELS * 2:
            seen[model].add(await fleet.who(model))
            seen[model].add(await fleet.who_over_http(model))
            chat = await fleet.openai.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "A long story. " * 10_000}]
            )
            seen[model].add(chat.choices[0].message.content)
            request = pb.GenerateRequest(model=model, text="HELLO").SerializeToString()
            texts = [message.delta.text async for message in generate(request)]
            seen[model].add("".join(texts))
    assert all(len(replicas) == 1 for replicas in seen.values()), seen
    assert set.union(*seen.values()) == set(fleet.replicas)


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
    await asyncio.gather(draining.grpc.refuse(), draining.http.refuse())
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


async def test_what_all_refuse_may_be_asked_again(fleet: Fleet) -> None:
    """After the last try the client is told UNAVAILABLE, with a time to retry after."""
    for replica in fleet.replicas.values():
        await replica.grpc.refuse()
    with pytest.raises((ShuttingDown, ServerUnavailable)) as caught:
        await fleet.who("lora1")
    assert caught.value.retry_after_s is not None


async def test_nothing_is_sent_before_the_first_token(fleet: Fleet) -> None:
    """Not even headers, at both doors: what began could not be asked elsewhere."""
    one = fleet.replicas["one"]
    one.service.tokens.clear()
    bodies = {
        "/v1/completions": {"prompt": "HELLO"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "HELLO"}]},
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


async def test_replicas_with_tls_and_keys(tmp_path: Path) -> None:
    """Envoy asks replicas for the certificate of a name, passes keys on, and needs none for itself."""
    certificates = Certificates(tmp_path)
    keys, ring = keyring("infer")
    guarded = Fleet(tmp_path, Guard(ring, certificates.server))
    tls = Tls(str(tmp_path / "ours.pem"), "localhost")
    async with (
        behind_envoy(guarded, tls=tls),
        AsyncClient(guarded.proxy.grpc, api_key=keys["infer"]) as client,
    ):
        assert (await client.complete("lora1", "HELLO")).text in guarded.replicas
        headers = {"authorization": f"Bearer {keys['infer']}"}
        answer = await guarded.web.get("/v1/models", headers=headers)
        assert answer.json()["data"][0]["id"] == MODELS[0]
        assert (await guarded.web.get("/v1/models")).status_code == 401


async def test_a_certificate_of_another_name_is_no_replica(tmp_path: Path) -> None:
    """What shows a certificate for another name gets no traffic."""
    replica = ScriptedReplica(tmp_path, "one", Guard(None, Certificates(tmp_path).server))
    await replica.start()
    tls = Tls(str(tmp_path / "ours.pem"), "elsewhere.example.com")
    envoy = Proxy(fleet_of([replica.doors], tls=tls), tmp_path)
    await asyncio.to_thread(envoy.start, healthy=False)
    await asyncio.to_thread(until, lambda: envoy.counter("ssl.fail_verify_san") > 1)
    assert not envoy.healthy()
    envoy.stop()
    await replica.drain()


async def test_replicas_have_names(tmp_path: Path) -> None:
    """Replicas that are given by name are found."""
    async with behind_envoy(Fleet(tmp_path), host="localhost") as made:
        assert await made.who("lora1") == await made.who_over_http("lora1")


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """Envoy keeps little of an answer that nobody reads: its replica has to wait, as it would without Envoy."""
    endless = Endless(tmp_path)
    http, rpc = doors_of(endless, http=protocol.Patience(read_s=0.5), rpc=calls.Patience(read_s=0.5))
    await http.start()
    await rpc.start()
    await rpc.set_serving(True)
    envoy = Proxy(fleet_of([(rpc.address, http.address)]), tmp_path)
    await asyncio.to_thread(envoy.start)
    body = {"model": "tiny", "prompt": "HELLO", "stream": True}
    async with (
        AsyncClient(envoy.grpc) as client,
        httpx.AsyncClient(base_url=envoy.url) as web,
        web.stream("POST", "/v1/completions", json=body),
    ):
        stream = client.generate("tiny", "HELLO")
        await anext(stream)
        assert endless.open == 2
        await endless.until(0, within_s=20)
    envoy.stop()
    await asyncio.gather(http.drain(0), rpc.drain(0))


async def test_the_log_has_no_prompt(fleet: Fleet) -> None:
    """It says which replica answered which model, under the id that the client gave, and nothing of a text."""
    headers = {"x-request-id": "mine-1", "authorization": "Bearer lmx_secret"}
    body = {"model": "lora1", "prompt": "SECRET WORDS"}
    await fleet.web.post("/v1/completions?SECRET", json=body, headers=headers)
    [line] = await asyncio.to_thread(fleet.proxy.requests, 1)
    assert (line["request_id"], line["model"], line["attempts"]) == ("mine-1", "lora1", 1)
    assert line["replica"] in {replica.http.address for replica in fleet.replicas.values()}
    assert "SECRET" not in str(line).upper()
