"""Scripted replicas behind the real Envoy, with the configuration that `loramux envoy` prints."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from pathlib import Path

import grpc
import httpx
import pytest
import pytest_asyncio
import yaml

from inference_service.api.http.wire import protocol
from loramux import AsyncClient
from loramux.faults import ServerUnavailable, ShuttingDown
from loramux.inference.v1 import inference_pb2 as pb
from loramux_envoy.config import Tls
from loramux_shared.access.guard import Guard
from loramux_shared.rpc import calls
from tests.fleet import Proxy
from tests.scripted_fleet import Fleet, behind_envoy, envoy_of
from tests.scripted_replica import MODELS, Named, ScriptedReplica
from tests.support.access import Certificates, keyring
from tests.support.root import ROOT
from tests.support.s3_gateway import free_ports
from tests.support.services.endless import Endless, apis_of
from tests.support.waiting import BOUND_S, bounded, until, wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")
GENERATE = "/loramux.inference.v1.InferenceService/Generate"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Three replicas behind an Envoy that waits long for a first token."""
    async with behind_envoy(Fleet(tmp_path_factory.mktemp("envoy"))) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared: Fleet) -> Fleet:
    """The shared fleet, which is idle."""
    await shared.idle()
    return shared


async def test_a_model_stays_with_its_replica(fleet: Fleet) -> None:
    """A model is answered by one replica over both APIs, and models are spread over all replicas."""
    seen = {model: {await fleet.who_over_http(model)} for model in MODELS}
    assert set.union(*seen.values()) == set(fleet.replicas)
    async with grpc.aio.insecure_channel(fleet.proxy.grpc) as channel:
        generate = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)
        for model in MODELS[:5]:
            seen[model].add(await fleet.replica_of(model))
            chat = await fleet.openai.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "A long story. " * 10_000}]
            )
            seen[model].add(chat.choices[0].message.content)
            request = pb.GenerateRequest(model=model, text="HELLO").SerializeToString()
            texts = [message.delta.text async for message in generate(request)]
            seen[model].add("".join(texts))
    assert all(len(replicas) == 1 for replicas in seen.values()), seen


async def test_the_header_comes_before_the_body(fleet: Fleet) -> None:
    """The model that a client names in `x-loramux-model` decides which replica answers, over both APIs."""
    expected = await fleet.replica_of("lora1")
    [other, *_] = [model for model in MODELS[:20] if await fleet.who_over_http(model) != expected]
    headers = {"x-loramux-model": "lora1"}
    answer = await fleet.web.post("/v1/completions", json={"model": other, "prompt": "HELLO"}, headers=headers)
    assert answer.json()["choices"][0]["text"] == expected
    async with grpc.aio.insecure_channel(fleet.proxy.grpc) as channel:
        generate = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)
        request = pb.GenerateRequest(model=other, text="HELLO").SerializeToString()
        call = generate(request, metadata=tuple(headers.items()))
        assert "".join([message.delta.text async for message in call]) == expected


async def test_the_check_of_compose_finds_it_ready(fleet: Fleet) -> None:
    """The command by which docker compose asks for Envoy succeeds where it is ready, and there alone."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    _, *command = compose["services"]["envoy"]["healthcheck"]["test"]
    for port, expected in ((fleet.proxy.admin_port, 0), (free_ports(1)[0], 1)):
        here = [word.replace("/9901", f"/{port}") for word in command]
        process = await asyncio.create_subprocess_exec(*here, stderr=asyncio.subprocess.DEVNULL)
        assert await process.wait() == expected


async def test_streams_of_one_model_spread(fleet: Fleet) -> None:
    """No replica has much more than the mean of the open requests, though all are for one model."""
    streams = [fleet.client.generate("base", "WAIT") for _ in range(24)]
    answers = [[await anext(stream), await anext(stream)][1] for stream in streams]
    assert max(Counter(delta.text for delta in answers).values()) <= 1.25 * 24 / 3 + 1
    for stream in streams:
        await stream.aclose()


async def test_a_refused_request_goes_to_another_replica(fleet: Fleet) -> None:
    """No client sees the refusal of a replica that drains before Envoy knows it, however large the request."""
    draining = fleet.replicas[await fleet.replica_of("lora1")]
    draining.service.refuses = ShuttingDown("the server is shutting down.")
    large = {"model": "lora1", "prompt": "A" * 6_000_000}
    answer = await fleet.web.post("/v1/completions", json=large)
    others = {answer.json()["choices"][0]["text"], (await fleet.client.complete("lora1", large["prompt"])).text}
    assert draining.service.name not in others
    assert [each["attempts"] for each in await asyncio.to_thread(fleet.proxy.requests, 3)] == [1, 2, 2]


async def test_a_refusal_of_all_replicas_keeps_its_reason(fleet: Fleet) -> None:
    """The client gets the last replica's fault after the last retry, with a time to retry after."""
    for replica in fleet.replicas.values():
        replica.service.refuses = ShuttingDown("the server is shutting down.")
    with pytest.raises(ShuttingDown) as caught:
        await fleet.replica_of("lora1")
    assert caught.value.retry_after_s is not None
    answer = await fleet.web.post("/v1/completions", json={"model": "lora1", "prompt": "HELLO"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


async def test_nothing_is_sent_before_the_first_text(fleet: Fleet) -> None:
    """A replica sends not even headers before there is text, so that another one may still answer."""
    one = fleet.replicas["one"]
    one.service.tokens.clear()
    bodies = {
        "/v1/completions": {"prompt": "HELLO"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "HELLO"}]},
        "/v1/messages": {"messages": [{"role": "user", "content": "HELLO"}], "max_tokens": 8},
    }
    async with (
        grpc.aio.insecure_channel(one.grpc.address) as channel,
        httpx.AsyncClient(base_url=f"http://{one.http.address}", timeout=BOUND_S) as web,
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
        await until(lambda: one.service.open == len(begun), "all requests at the replica")
        # Whatever the replica had sent by now would come before these answers on the same loop and channel.
        assert (await web.get("/health")).status_code == 200
        assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        assert not any(each.done() for each in begun)
        one.service.tokens.set()
        await asyncio.gather(*begun)
        async for _ in call:
            pass


async def test_the_log_has_no_prompt(fleet: Fleet) -> None:
    """A log line names replica, model and the client's request id, and holds no text and no key."""
    headers = {"x-request-id": "mine-1", "authorization": "Bearer lmx_secret"}
    body = {"model": "lora1", "prompt": "SECRET WORDS"}
    await fleet.web.post("/v1/completions?SECRET", json=body, headers=headers)
    [line] = await asyncio.to_thread(fleet.proxy.requests, 1)
    assert (line["request_id"], line["model"], line["attempts"]) == ("mine-1", "lora1", 1)
    assert line["replica"] in {replica.http.address for replica in fleet.replicas.values()}
    assert "SECRET" not in str(line).upper()


async def test_a_replica_without_tokens_is_left(tmp_path: Path) -> None:
    """A replica whose stream has no token in time loses it and gets no others; whole answers may wait."""
    async with behind_envoy(Fleet(tmp_path), first_token_s=1) as fleet:
        slow = fleet.replicas[await fleet.replica_of("lora1")].service
        slow.tokens.clear()
        whole = asyncio.create_task(fleet.who_over_http("lora1"))
        await until(lambda: slow.open, "the answer that is not streamed")
        await left(fleet, "replicas_grpc", fleet.replica_of, slow)
        assert not whole.done()
        slow.tokens.set()
        assert await whole == slow.name
        slow.tokens.clear()
        await left(fleet, "replicas_http", fleet.streamed, slow)


async def left(fleet: Fleet, api: str, ask: Callable[[str], Awaitable[str]], slow: Named) -> None:
    """Ask again and again, until Envoy leaves a replica that took requests and had no token for them."""
    ejections = f"{api}.outlier_detection.ejections_enforced_consecutive_local_origin_failure"
    before = slow.asked
    async with bounded(f"a replica that is left at the API {api}"):
        while not await asyncio.to_thread(fleet.proxy.counter, ejections):
            # Envoy counts those that wait at the same time: each one that it sends on restarts the count.
            assert slow.name not in await asyncio.gather(*(ask("lora1") for _ in range(9)))
    assert slow.asked - before >= 3


async def test_replicas_that_leave_are_left_in_peace(tmp_path: Path) -> None:
    """A replica without health keeps its streams and gets no new ones; without replicas, errors have names."""
    async with behind_envoy(Fleet(tmp_path)) as fleet:
        leaving = fleet.replicas[await fleet.replica_of("lora1")]
        stream = fleet.client.generate("lora1", "WAIT")
        assert [(await anext(stream)).model, (await anext(stream)).text] == ["lora1", leaving.service.name]
        await leaving.leave()
        async with bounded("answers of another replica over both APIs"):
            while leaving.service.name in (await fleet.replica_of("lora1"), await fleet.who_over_http("lora1")):
                pass
        await leaving.grpc.refuse()
        leaving.service.ends.set()
        assert [type(event).__name__ async for event in stream] == ["Finished"]
        for replica in fleet.replicas.values():
            await replica.leave()
        await asyncio.to_thread(fleet.proxy.until_healthy, 0)
        body = {"model": "lora1", "prompt": "HELLO"}
        async with bounded("an answer of Envoy itself over both APIs"):
            while (answer := await fleet.web.post("/v1/completions", json=body)).status_code == 200:
                pass
            with pytest.raises(ServerUnavailable, match="no healthy upstream"):
                [await fleet.replica_of("lora1") for _ in count()]
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "server_unavailable")
        answer = await fleet.web.post("/v1/messages?beta=true", json={}, headers={"x-request-id": "mine-1"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        parsed = answer.json()
        assert (parsed["type"], parsed["error"]["type"]) == ("error", "overloaded_error")
        assert parsed["request_id"] == "mine-1"


async def test_replicas_with_names_tls_and_keys(tmp_path: Path) -> None:
    """Envoy finds replicas by name, wants a certificate for that name, and passes keys on."""
    certificates = Certificates(tmp_path)
    keys, ring = keyring("infer")
    guarded = Fleet(tmp_path, Guard(ring, certificates.server))
    tls = Tls(str(tmp_path / "ours.pem"), "localhost")
    async with (
        behind_envoy(guarded, host="localhost", tls=tls),
        AsyncClient(guarded.proxy.grpc, api_key=keys["infer"]) as client,
    ):
        assert (await client.complete("lora1", "HELLO")).text in guarded.replicas
        headers = {"authorization": f"Bearer {keys['infer']}"}
        answer = await guarded.web.get("/v1/models", headers=headers)
        assert answer.json()["data"][0]["id"] == MODELS[0]
        assert (await guarded.web.get("/v1/models")).status_code == 401


async def test_a_certificate_of_another_name_is_no_replica(tmp_path: Path) -> None:
    """A server whose certificate is for another name gets no traffic."""
    replica = ScriptedReplica(tmp_path, "one", Guard(None, Certificates(tmp_path).server))
    await replica.start()
    tls = Tls(str(tmp_path / "ours.pem"), "elsewhere.example.com")
    try:
        async with envoy_of(replica.apis, folder=tmp_path, tls=tls) as envoy:
            await asyncio.to_thread(wait_until, lambda: refused(envoy) > 1, "two refused certificates")
            assert not envoy.healthy()
    finally:
        await replica.drain()


def refused(envoy: Proxy) -> int:
    return envoy.counter("ssl.fail_verify_san")


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """Envoy keeps little of an answer that its client does not read, so the replica waits and cuts it off."""
    endless = Endless(tmp_path)
    http, rpc = apis_of(endless, http=protocol.ClientTimeouts(read_s=0.5), rpc=calls.Patience(read_s=0.5))
    await http.start()
    await rpc.start()
    await rpc.set_serving(True)
    body = {"model": "tiny", "prompt": "HELLO", "stream": True}
    try:
        async with (
            envoy_of((rpc.address, http.address), folder=tmp_path) as envoy,
            AsyncClient(envoy.grpc) as client,
            httpx.AsyncClient(base_url=envoy.url, timeout=BOUND_S) as web,
            web.stream("POST", "/v1/completions", json=body) as begun,
        ):
            assert begun.status_code == 200
            await anext(client.generate("tiny", "HELLO"))
            await until(lambda: not endless.open, "the ends of both answers", lambda: endless.open)
    finally:
        await asyncio.gather(http.drain(0), rpc.drain(0))
