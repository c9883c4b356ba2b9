"""The services on a Ray cluster: three replicas of a tiny real model, and a builder."""

import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, is_dataclass
from itertools import count
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from loramux.client import AsyncClient, Client
from loramux.faults import ModelNotFound, ReplicaFailed, RequestInvalid
from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc
from loramux.records import Delta, Event
from loramux_shared.storage.open import open_store
from tests.ray_cluster import NAMES, RayFleet, ray_world, settings_of
from tests.support.grpc_api import open_rpc
from tests.support.openai_api import open_api
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, wait_until

pytestmark = [pytest.mark.whole, pytest.mark.timeout(1800)]  # the first test starts the cluster
PROMPT = "The party of the first part"
FIELDS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "logprobs": 2, "timeout_s": BOUND_S}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model and eight adapters, built."""
    return ray_world(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def cluster(world: World) -> Iterator[RayFleet]:
    running = RayFleet()
    try:
        builder = {"store": f"file://{world.root}/store", "local_roots": [str(world.root)]}
        running.run(settings_of(world), builder, replicas=3, num_cpus=1)
        yield running
    finally:
        running.close()


@pytest.fixture
def fleet(cluster: RayFleet) -> RayFleet:
    """The cluster, whose replicas have nothing to do."""
    cluster.until(lambda: not any(cluster.ask(in_work)), "idle replicas")
    return cluster


def in_work(engine: Any) -> int:
    return int(engine.replica.ready.service.in_work)


@pytest.fixture
def client(fleet: RayFleet) -> Iterator[Client]:
    with Client(fleet.rpc, fleet.rpc, timeout_s=BOUND_S) as opened:
        yield opened


def together(events: list[Event]) -> list[object]:
    """Return the content of an answer, whatever its timing; deltas are cut where time cuts them."""
    deltas = [event for event in events if isinstance(event, Delta)]
    return [
        "".join(each.text for each in deltas),
        [token for each in deltas for token in each.token_ids],
        [each for delta in deltas for each in delta.logprobs],
        [(event.reason, event.usage.completion_tokens) for event in events if hasattr(event, "reason")],
        [(event.model, event.adapter_digest) for event in events if hasattr(event, "adapter_digest")],
    ]


def content_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return an answer without the fields that differ between two requests."""
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def agree(one: Any, other: Any) -> bool:
    """Return True if answers are equal but for the last digits of scores, which vary with batch and timing."""
    if isinstance(one, float):
        return bool(one == pytest.approx(other, abs=1e-4))
    if is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(other) and agree(astuple(one), astuple(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(agree(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(agree, one, other))
    return bool(one == other)


@pytest_asyncio.fixture
async def single(world: World) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    """A service beside Ray's, with our own servers: the gRPC address, and a client of the HTTP API."""
    settings: dict[str, Any] = {"backend": "torch", "native": False, "threads": 1}
    store = open_store(f"file://{world.root}/store")
    async with open_api((world, store), **settings) as api, open_rpc(api.ready.service) as server:
        yield server.address, api.http


async def test_answers_equal_those_of_a_single_service(
    fleet: RayFleet, single: tuple[str, httpx.AsyncClient]
) -> None:
    """The base and adapters answer through both of Ray's proxies as one process does, streamed or not."""

    async def events(address: str, model: str) -> list[object]:
        async with AsyncClient(address, timeout_s=BOUND_S) as opened:
            return together([event async for event in opened.generate(model, PROMPT, **FIELDS)])

    for model in ("base", "a1", "a5"):
        assert agree(await events(fleet.rpc, model), await events(single[0], model))
    async with httpx.AsyncClient(base_url=fleet.url, timeout=BOUND_S) as ray_http:
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 9,
            "temperature": 0,
            "logprobs": True,
        }
        for model in ("base", "a2"):
            requests = body | {"model": model}
            answers = [await http.post("/v1/chat/completions", json=requests) for http in (ray_http, single[1])]
            assert agree(content_of(answers[0].json()), content_of(answers[1].json()))
            streamed = [
                await http.post("/v1/chat/completions", json=requests | {"stream": True})
                for http in (ray_http, single[1])
            ]
            assert text_of(streamed[0]) == text_of(streamed[1])
            assert streamed[0].headers["x-loramux-digest" if model != "base" else "x-loramux-model"]


def text_of(response: httpx.Response) -> tuple[str, str]:
    """The text of a stream, and how it ends."""
    *events, end, _ = response.text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    return text, end


def test_what_is_refused_has_its_reason_and_no_stack_trace(fleet: RayFleet, client: Client) -> None:
    """A refusal is the one of our own servers, with its details, whichever proxy of Ray's sends it."""
    with pytest.raises(ModelNotFound, match="Served: base, a0"):
        client.complete("nobody", PROMPT)
    with pytest.raises(RequestInvalid) as caught:
        client.complete("a1", PROMPT, temperature=-1)
    assert [finding.where for finding in caught.value.findings] == ["temperature"]
    answer = httpx.post(
        f"{fleet.url}/v1/completions", json={"model": "a1", "prompt": "x", "n": 0}, timeout=BOUND_S
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert answer.headers.get_list("x-request-id", split_commas=True) == [answer.headers["x-request-id"]]
    with grpc.insecure_channel(fleet.rpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(model="a1", text=PROMPT)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(request, metadata=[("application", "other")], timeout=BOUND_S))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "'other'" in refused.value.details()
        assert "Traceback" not in refused.value.details()
        with pytest.raises(grpc.RpcError, match="larger than 8388608 bytes"):
            list(stub.Generate(pb.GenerateRequest(model="a1", text="x" * (9 << 20)), timeout=BOUND_S))


def test_a_model_is_answered_where_its_adapter_is(fleet: RayFleet, client: Client) -> None:
    """Each of eight adapters is answered by one or two of three replicas, over both APIs; the base by all."""

    def by_model(engine: Any) -> dict[str, int]:
        lines = engine.replica.ready.service.local.metrics.render().decode().splitlines()
        found = [line for line in lines if line.startswith("loramux_requests_total{")]
        return {line.split('model="')[1].split('"')[0]: float(line.rpartition(" ")[2]) for line in found}

    fleet.until(lambda: len(fleet.ask(in_work)) == 3, "three replicas")
    with ThreadPoolExecutor(8) as pool:
        requests = [*NAMES * 4, *["base"] * 24]
        list(pool.map(lambda name: client.complete(name, PROMPT, max_tokens=2, timeout_s=BOUND_S), requests))
    with httpx.Client(base_url=fleet.url, timeout=BOUND_S) as http:
        for name in (*NAMES, *(f"base:{name}" for name in NAMES)):
            http.post(
                "/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2}
            ).raise_for_status()
    counts = fleet.ask(by_model)
    assert len(counts) == 3
    for name in NAMES:
        assert 1 <= sum(count.get(name, 0) > 0 for count in counts) <= 2
    assert sum(count.get("base", 0) > 0 for count in counts) == 3


def switched(fleet: RayFleet, path: str, *, paused: bool) -> None:
    """Pause every replica, or resume it, through Ray's proxy: by keys, until one has led to each."""
    keys = count()

    def all_are() -> bool:
        headers = {"x-loramux-model": f"key {next(keys)}"}
        httpx.post(f"{fleet.url}{path}", headers=headers, timeout=BOUND_S).raise_for_status()
        return all(each is paused for each in fleet.ask(lambda engine: engine.replica.ready.engine.paused))

    fleet.until(all_are, f"{path} at every replica")


def test_a_killed_replica_takes_with_it_what_had_begun(fleet: RayFleet, client: Client) -> None:
    """A request without a token is answered by another replica; a stream is UNAVAILABLE, with a delay."""
    expected = {name: client.complete(name, PROMPT, **FIELDS).text for name in NAMES}
    begun: dict[str, Generator[Event, None, None]] = {}

    def held() -> list[tuple[int, int]]:
        """Return the streams that began at replicas that stand still, unless all of them ended before."""
        switched(fleet, "/resume", paused=False)
        for name in NAMES:
            begun[name] = client.generate(name, PROMPT, max_tokens=200, ignore_eos=True, n=8, timeout_s=BOUND_S)
            next(begun[name]), next(begun[name])  # Started, and a first token
        switched(fleet, "/pause?mode=keep", paused=True)
        at_work = fleet.ask(lambda engine: (engine.replica.ready.service.in_work, os.getpid()))
        return at_work if any(had for had, _ in at_work) else []

    at_work = wait_until(held, "streams under way")
    under_way = sum(had for had, _ in at_work)
    victim_had, victim = max(at_work)
    with ThreadPoolExecutor(24) as pool:
        waiting = {name: pool.submit(client.complete, name, PROMPT, **FIELDS) for name in NAMES}
        body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "temperature": 0}
        plain = {
            name: pool.submit(
                httpx.post, f"{fleet.url}/v1/completions", json=body | {"model": name}, timeout=BOUND_S
            )
            for name in NAMES
        }
        fleet.until(lambda: sum(fleet.ask(in_work)) == under_way + 16, "all requests at replicas")
        os.kill(victim, signal.SIGKILL)
        switched(fleet, "/resume", paused=False)
        assert {name: each.result().text for name, each in waiting.items()} == expected
        texts = {name: each.result().json()["choices"][0]["text"] for name, each in plain.items()}
        assert texts == expected
    ends = [end_of(events) for events in begun.values()]
    assert ends.count("the replica ended before the answer was complete. Retry. 1 s") == victim_had
    assert ends.count("") == len(begun) - victim_had


def end_of(events: Generator[Event, None, None]) -> str:
    try:
        list(events)
    except ReplicaFailed as fault:
        return f"{fault.message} {fault.retry_after_s:g} s"
    return ""


def test_a_generation_comes_while_it_is_served(fleet: RayFleet, client: Client, world: World) -> None:
    """An adapter that is pushed to the builder through Ray's proxy is served by every replica."""
    stop, failures = threading.Event(), []

    def traffic() -> None:
        while not stop.is_set():
            try:
                client.complete("a0", PROMPT, max_tokens=4, timeout_s=BOUND_S)
            except Exception as error:  # noqa: BLE001 - each is reported
                failures.append(error)

    beside = threading.Thread(target=traffic)
    beside.start()
    try:
        pushed = client.push("tiny", "fresh", world.adapters["a1"])
        answer = client.complete("fresh", PROMPT, min_generation=pushed.generation, **FIELDS)
    finally:
        stop.set()
        beside.join(BOUND_S)
    assert not beside.is_alive()
    assert answer.text == client.complete("a1", PROMPT, **FIELDS).text
    assert not failures
    fleet.until(
        lambda: set(fleet.ask(lambda engine: engine.replica.ready.service.local.catalog.generation)) == {2},
        "the new generation at every replica",
    )
