"""Names, versions, aliases and limits through both APIs, on a real engine, from a deployment file on."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from inference_service.adapters.served_model import NO_DEFAULTS, AdapterDefaults
from inference_service.core.sequence import Sequence
from inference_service.http.server import HttpServer
from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.serving.request import AnswerDelta, AnswerStarted, Request
from inference_service.serving.service import GenerationService
from inference_service.serving.telemetry.record import RequestRecord
from inference_service.startup.load import Ready
from loramux.client import AsyncClient
from loramux.faults import ModelNotFound, RateLimited, ReplicaBehind
from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc
from loramux.messages import deployment_from_message, deployment_to_message
from loramux_shared.access.guard import Guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import Generation
from loramux_shared.deployment import Deployment, ModelLimits, Runtime
from loramux_shared.rpc.server import RpcServer
from loramux_shared.runtime import Limits
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.access import lines, new_entry
from tests.support.generations import change_deployed
from tests.support.metrics import Scrape
from tests.support.service import until_free
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, until

RUNTIME = {
    "served_model_name": "base",
    "speculative_tokens": 0,
    "aliases": {"alias": {"rs": 50, "wide": 50}, "one": {"rs": 1, "wide": 0}},
    "limits": {"models": {"all": {"weight": 2, "max_running": 1, "tokens_per_minute": 10}}},
}
PROMPT = [5, 6, 7, 8]
FIELDS = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def built(world: tuple[World, MemoryStore]) -> tuple[MemoryStore, Deployment]:
    """A store into which a deployment was built that came as a message, with names and limits."""
    runtime = Runtime.model_validate(RUNTIME)
    stated = world[0].deployment().model_copy(update={"runtime": runtime})
    deployment, store = deployment_from_message(deployment_to_message(stated)), MemoryStore()
    build(
        deployment,
        BuildContext(store, open_sources(local_roots=[world[0].root])),
        Progress(deployment.build.lora_adapters),
    )
    return store, deployment


class ReplicaApis:
    """The APIs of a replica, and the models."""

    def __init__(self, ready: Ready, generation: Generation, guard: Guard) -> None:
        self.ready = ready
        self.generation = generation
        services = {SERVICE_NAME: InferenceServicer(ready.service).register}
        self.rpc = RpcServer("127.0.0.1:0", services, guard)
        self.web = HttpServer("127.0.0.1:0", ready.service, guard)

    async def start(self) -> None:
        """Listen."""
        self.http = httpx.AsyncClient(base_url=f"http://{await self.web.start()}", timeout=BOUND_S)
        self.address = await self.rpc.start()
        self.client = AsyncClient(self.address)
        self.ready.engine.start()
        await self.rpc.set_serving(True)

    async def close(self) -> None:
        """Let everything go."""
        await until_free(self.ready)
        await self.client.close()
        await self.http.aclose()
        await self.web.drain(5)
        await self.rpc.drain(5)
        await self.ready.engine.stop()

    def digest(self, name: str) -> str:
        """The digest that a name had at the start."""
        return self.generation.adapters[name].digest

    def later(self, number: int, **digests: str) -> Generation:
        """A later generation, in which names have the digests of others."""
        adapters = {name: self.generation.adapters[other] for name, other in digests.items()}
        return self.generation.model_copy(update={"number": number, "adapters": adapters})

    async def ask(self, model: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """Complete a prompt over HTTP."""
        body = FIELDS | {"model": model, "prompt": PROMPT, "return_token_ids": True} | fields
        return await self.http.post("/v1/completions", json=body, headers=headers)

    async def tokens(self, model: str) -> list[int]:
        """The greedy tokens of a model."""
        request = Request.of(model, PROMPT, max_tokens=4, temperature=0, ignore_eos=True)
        events = [event async for event in self.ready.service.generate(request)]
        return [token.id for event in events if isinstance(event, AnswerDelta) for token in event.tokens]


@pytest_asyncio.fixture
async def apis(
    world: tuple[World, MemoryStore], built: tuple[MemoryStore, Deployment]
) -> AsyncIterator[ReplicaApis]:
    """The APIs of a replica of the deployment."""
    store, _ = built
    generation = current_generation(store, "tiny")
    opened = ReplicaApis(world[0].load(store, stream_interval_ms=0), generation, Guard())
    await opened.start()
    yield opened
    await opened.close()


def test_what_the_file_says_is_in_the_generation(
    world: tuple[World, MemoryStore], built: tuple[MemoryStore, Deployment]
) -> None:
    """Aliases, limits and drafts travel as a message and in the record; bytes without them are older ones."""
    store, deployment = built
    assert deployment.runtime == Runtime.model_validate(RUNTIME)
    generation = current_generation(store, "tiny")
    assert generation.aliases == RUNTIME["aliases"]
    assert generation.speculative_tokens == 0
    assert generation.limits.of("all") == Limits(weight=2, max_running=1, tokens_per_minute=10)
    plain = current_generation(world[1], "tiny")
    assert not {"aliases", "limits", "speculative_tokens"} & json.loads(plain.to_bytes()).keys()


async def test_a_request_ends_on_the_version_that_it_began_with(apis: ReplicaApis) -> None:
    """A switched name is another version for the next request, and a removed name is unknown."""
    service = apis.ready.service
    expected = {name: await apis.tokens(name) for name in ("rs", "wide")}
    assert expected["rs"] != expected["wide"]
    events = service.generate(Request.of("rs", PROMPT, max_tokens=4, temperature=0, ignore_eos=True))
    started = await anext(events)
    assert isinstance(started, AnswerStarted)
    changes = apis.ready.adapters.apply(apis.later(2, rs="wide"))
    assert (changes.switched, set(changes.removed)) == (("rs",), {"all", "wide"})
    rest = [event async for event in events]
    emitted = [token.id for event in rest if isinstance(event, AnswerDelta) for token in event.tokens]
    assert (emitted, started.model.digest, started.generation) == (expected["rs"], apis.digest("rs"), 1)
    answer = await apis.ask("rs")
    assert answer.json()["choices"][0]["token_ids"] == expected["wide"]
    assert answer.headers["x-loramux-digest"] == apis.digest("wide")
    assert answer.headers["x-loramux-generation"] == "2"
    old = await apis.client.complete(f"rs@{apis.digest('rs')[:10]}", PROMPT, max_tokens=4, ignore_eos=True)
    assert (list(old.token_ids), old.started.adapter_digest) == (expected["rs"], apis.digest("rs"))
    with pytest.raises(ModelNotFound):
        await apis.client.complete("wide", PROMPT)


async def test_http_says_who_answers(apis: ReplicaApis) -> None:
    """The answering model is named in the body, and in headers of whole answers and of streams; the base has no
    digest.
    """
    for fields in ({}, {"stream": True}):
        answer = await apis.ask("one", **fields)
        assert answer.headers["x-loramux-model"] == "rs"
        assert answer.headers["x-loramux-digest"] == apis.digest("rs")
        assert answer.headers["x-loramux-generation"] == "1"
        assert '"model":"rs"' in answer.text
    messages = [{"role": "user", "content": "x"}]
    answer = await apis.ask("base")
    assert answer.headers["x-loramux-model"] == "base"
    assert "x-loramux-digest" not in answer.headers
    refused = await apis.http.post("/v1/chat/completions", json={"model": "none", "messages": messages})
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
    assert "x-loramux-model" not in refused.headers


async def test_an_alias_sticks_to_a_user_at_both_apis(apis: ReplicaApis) -> None:
    """A user, a header, a field and metadata are one key."""
    channel = grpc.aio.insecure_channel(apis.address)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    picked = set()
    for key in ("ann", "bob", "cid", "dan"):
        by_user = (await apis.ask("alias", user=key)).json()["model"]
        by_header = (await apis.ask("alias", {"x-loramux-key": key}, user="other")).json()["model"]
        by_field = (await apis.client.complete("alias", PROMPT, max_tokens=1, sticky_key=key)).started.model
        request = pb.GenerateRequest(model="alias", token_ids=pb.TokenIds(ids=PROMPT), sticky_key="other")
        first = await stub.Generate(request, metadata=(("x-loramux-key", key),)).read()
        assert {by_user, by_header, by_field, first.started.model} == {by_user}
        picked.add(by_user)
    assert picked == {"rs", "wide"}
    await channel.close()


async def test_a_replica_catches_up_first(
    world: tuple[World, MemoryStore], built: tuple[MemoryStore, Deployment]
) -> None:
    """A replica catches up where it can; a generation that it cannot find is REPLICA_BEHIND, with the time to
    retry.
    """
    store = MemoryStore()
    store.objects.update(built[0].objects)
    generation = current_generation(store, "tiny")
    apis = ReplicaApis(world[0].load(store, stream_interval_ms=0), generation, Guard())
    await apis.start()
    with pytest.raises(ReplicaBehind) as behind:
        await apis.client.complete("rs", PROMPT, min_generation=2)
    assert behind.value.retry_after_s == 1.0
    async with grpc.aio.insecure_channel(apis.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(model="rs", token_ids=pb.TokenIds(ids=PROMPT))
        with pytest.raises(grpc.aio.AioRpcError, match=r"generation 9 .* this replica serves 1"):
            await stub.Generate(request, metadata=(("x-loramux-min-generation", "9"),)).read()
        with pytest.raises(grpc.aio.AioRpcError, match="generation is not valid"):
            await stub.Generate(request, metadata=[("x-loramux-min-generation", n) for n in "19"]).read()
    for refused in (
        await apis.ask("rs", min_generation=2),
        await apis.ask("rs", {"x-loramux-min-generation": "2"}),
    ):
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "replica_behind"

    publish_generation(store, apis.later(2, rs="wide", new="rs"))
    answer = await apis.ask("new", {"x-loramux-min-generation": "2"}, min_generation=1)
    assert (answer.status_code, answer.headers["x-loramux-generation"]) == (200, "2")
    publish_generation(store, apis.later(3, rs="wide"))
    reported = await apis.client.complete("rs", PROMPT, max_tokens=1, min_generation=3)
    assert (reported.started.generation, reported.started.adapter_digest) == (3, apis.digest("wide"))
    assert (await apis.ask("rs", {"x-loramux-min-generation": "x"})).status_code == 400
    await apis.close()


async def test_a_model_at_its_limit_is_refused_alone(apis: ReplicaApis) -> None:
    """The refusal is 429 for OpenAI's clients, and RESOURCE_EXHAUSTED with RetryInfo; others are answered."""
    assert (await apis.ask("all")).status_code == 200
    assert (await apis.ask("all")).status_code == 200
    refused = await apis.ask("all")
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
    )
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    with pytest.raises(RateLimited) as limited:
        await apis.client.complete("all", PROMPT)
    assert limited.value.retry_after_s is not None
    assert 30 < limited.value.retry_after_s <= 42
    assert (await apis.ask("rs")).status_code == 200
    apis.ready.adapters.apply(apis.generation.model_copy(update={"number": 2, "limits": Runtime().limits}))
    assert (await apis.ask("all")).status_code == 200
    counted = await apis.http.get("/metrics")
    scrape = Scrape(counted.text)
    assert scrape.value("loramux_requests_total", model="all", outcome="RATE_LIMITED") == 2


class Noted:
    """Notes the sequences of requests that ended."""

    def __init__(self) -> None:
        self.seqs: list[Sequence] = []

    def began(self, record: RequestRecord) -> None:
        """Hear nothing."""

    def emitted(self, record: RequestRecord, delta: AnswerDelta) -> None:
        """Hear nothing."""

    def ended(self, record: RequestRecord) -> None:
        """Note the ended requests."""
        self.seqs += [answer.seq for answer in record.answers]


async def test_the_engine_gets_flow_and_share(apis: ReplicaApis) -> None:
    """A model's weight and share in the deployment file reach its sequences."""
    made, noted = apis.ready.service, Noted()
    service = GenerationService(made.catalog, made.text, apis.ready.engine, made.limits, [noted])
    for model in ("all", "base", "one"):
        async with aclosing(service.generate(Request.of(model, PROMPT, max_tokens=1))) as events:
            async for _ in events:
                pass
    reported = [(seq.model, seq.flow, seq.share.weight, seq.share.max_running) for seq in noted.seqs]
    assert reported == [("all", "all", 2.0, 1), ("base", "base", 1.0, None), ("rs", "rs", 1.0, None)]


async def test_a_key_has_its_limits_at_both_apis(world: tuple[World, MemoryStore]) -> None:
    """A key's limits hold over both APIs together; the other key is not concerned."""
    generation = current_generation(world[1], "tiny")
    (ann, of_ann), (bob, of_bob) = new_entry("ann", "infer"), new_entry("bob", "infer")
    of_ann = of_ann.model_copy(update={"limits": Limits(tokens_per_minute=8)})
    apis = ReplicaApis(world[0].load(world[1]), generation, Guard(Keyring(text=lines(of_ann, of_bob))))
    await apis.start()
    headers = [{"authorization": f"Bearer {key}"} for key in (ann, bob)]
    assert [(await apis.ask("rs", each)).status_code for each in headers] == [200, 200]
    assert [(await apis.ask("wide", each)).status_code for each in headers] == [429, 200]
    async with AsyncClient(apis.address, api_key=ann) as client:
        with pytest.raises(RateLimited, match="the API key 'ann'"):
            await client.complete("base", PROMPT)
    await apis.close()


def hold(apis: ReplicaApis) -> asyncio.Event:
    """Keep requests before they are tokenized, until the event is set."""
    gate = asyncio.Event()

    async def slowly(digest: str, name: str) -> AdapterDefaults:
        await gate.wait()
        return NO_DEFAULTS

    apis.ready.bank.texts.defaults = slowly  # type: ignore[method-assign]
    for name in ("rs", "wide"):
        apis.ready.service.catalog.know(apis.digest(name), defaults=None)
    return gate


async def until_held(apis: ReplicaApis, count: int) -> None:
    """Wait until so many requests are in work."""
    service = apis.ready.service
    await until(lambda: service.in_work == count, f"{count} requests in work", lambda: service.in_work)


def limits(**default: int) -> ModelLimits:
    """The same for each model."""
    return ModelLimits(default=Limits(**default))


@pytest.mark.beside
async def test_tokens_of_a_minute_are_not_used_twice(apis: ReplicaApis) -> None:
    """Waiting requests are checked again before the engine, so no token of the minute is used twice."""
    change_deployed(apis.ready.service.catalog, limits=limits(tokens_per_minute=4))
    gate = hold(apis)
    waiting = [asyncio.ensure_future(apis.ask("rs")) for _ in range(3)]
    await until_held(apis, 3)
    gate.set()
    answers = await asyncio.gather(*waiting)
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
