"""Names, versions, aliases and limits through both APIs, on a real engine, from a deployment file on."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from inference_service.core.served_model import NO_DEFAULTS, AdapterDefaults
from inference_service.startup.load import Ready
from loramux.client import AsyncClient
from loramux.faults import GenerationNotFound, ModelNotFound, RateLimited
from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc
from loramux.messages import deployment_from_message, deployment_to_message
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import Generation
from loramux_shared.deployment import Deployment, ModelLimits, Runtime
from loramux_shared.runtime import Limits
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.access import lines, new_entry
from tests.support.generations import change_deployed
from tests.support.grpc_api import open_rpc
from tests.support.metrics import Scrape
from tests.support.openai_api import open_api
from tests.support.stores.killed import copy_store
from tests.support.tiny import World
from tests.support.waiting import until

RUNTIME = {
    "served_model_name": "base",
    "speculative_tokens": 0,
    "aliases": {"alias": {"rs": 50, "wide": 50}, "one": {"rs": 1, "wide": 0}},
    "limits": {"models": {"all": {"weight": 2, "max_running": 1, "tokens_per_minute": 10}}},
}
PROMPT = [5, 6, 7, 8]
FIELDS: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


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


@dataclass(frozen=True)
class ReplicaApis:
    """Both APIs of a replica, and the generation that it had at the start."""

    http: httpx.AsyncClient
    address: str
    client: AsyncClient
    ready: Ready
    generation: Generation

    def digest(self, name: str) -> str:
        return self.generation.adapters[name].digest

    def later(self, number: int, **digests: str) -> Generation:
        """A later generation, in which names have the digests of others."""
        adapters = {name: self.generation.adapters[other] for name, other in digests.items()}
        return self.generation.model_copy(update={"number": number, "adapters": adapters})

    async def ask(self, model: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """Complete a prompt over HTTP."""
        body = FIELDS | {"model": model, "prompt": PROMPT, "return_token_ids": True} | fields
        return await self.http.post("/v1/completions", json=body, headers=headers)

    async def first(self, model: str, key: str, *values: str) -> pb.GenerateResponse:
        """Return the first message of a call over gRPC with metadata."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = pb.GenerateRequest(model=model, token_ids=pb.TokenIds(ids=PROMPT), sticky_key="other")
            return await stub.Generate(request, metadata=[(key, value) for value in values]).read()


@asynccontextmanager
async def opened(world: World, store: MemoryStore, guard: Guard = NOBODY_GUARDS) -> AsyncIterator[ReplicaApis]:
    generation = current_generation(store, "tiny")
    async with (
        open_api((world, store), guard) as api,
        open_rpc(api.ready.service, guard) as rpc,
        AsyncClient(rpc.address) as client,
    ):
        yield ReplicaApis(api.http, rpc.address, client, api.ready, generation)


@pytest_asyncio.fixture
async def apis(
    world: tuple[World, MemoryStore], built: tuple[MemoryStore, Deployment]
) -> AsyncIterator[ReplicaApis]:
    async with opened(world[0], built[0]) as apis:
        yield apis


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
    rs, wide = [(await apis.client.complete(name, PROMPT, **FIELDS)).token_ids for name in ("rs", "wide")]
    assert rs != wide
    await apis.ready.engine.pause()
    running = asyncio.create_task(apis.client.complete("rs", PROMPT, **FIELDS))
    await until(lambda: apis.ready.engine.stats.waiting, "the request that is held")
    changes = apis.ready.adapters.apply(apis.later(2, rs="wide"))
    assert (changes.switched, set(changes.removed)) == (("rs",), {"all", "wide"})
    apis.ready.engine.resume()
    before = await running
    assert (before.token_ids, before.started.adapter_digest) == (rs, apis.digest("rs"))
    assert before.started.generation == 1
    answer = await apis.ask("rs")
    assert tuple(answer.json()["choices"][0]["token_ids"]) == wide
    assert answer.headers["x-loramux-digest"] == apis.digest("wide")
    assert answer.headers["x-loramux-generation"] == "2"
    old = await apis.client.complete(f"rs@{apis.digest('rs')[:10]}", PROMPT, **FIELDS)
    assert (old.token_ids, old.started.adapter_digest) == (rs, apis.digest("rs"))
    with pytest.raises(ModelNotFound):
        await apis.client.complete("wide", PROMPT)


async def test_http_says_who_answers(apis: ReplicaApis) -> None:
    """The body, and headers of answers and streams, name the answering model; the base has no digest."""
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
    picked = set()
    for key in ("ann", "bob", "cid", "dan"):
        by_user = (await apis.ask("alias", user=key)).json()["model"]
        by_header = (await apis.ask("alias", {"x-loramux-key": key}, user="other")).json()["model"]
        by_field = (await apis.client.complete("alias", PROMPT, max_tokens=1, sticky_key=key)).started.model
        by_metadata = (await apis.first("alias", "x-loramux-key", key)).started.model
        assert {by_user, by_header, by_field, by_metadata} == {by_user}
        picked.add(by_user)
    assert picked == {"rs", "wide"}


async def test_a_replica_catches_up_first(
    world: tuple[World, MemoryStore], built: tuple[MemoryStore, Deployment]
) -> None:
    """A replica catches up with a generation, or says that there is none of that number."""
    store = copy_store(built[0])
    async with opened(world[0], store) as apis:
        with pytest.raises(GenerationNotFound):
            await apis.client.complete("rs", PROMPT, min_generation=2)
        with pytest.raises(grpc.aio.AioRpcError, match=r"generation 9, and the newest that was published is 1"):
            await apis.first("rs", "x-loramux-min-generation", "9")
        with pytest.raises(grpc.aio.AioRpcError, match="generation is not valid"):
            await apis.first("rs", "x-loramux-min-generation", "1", "9")
        refused = await apis.ask("rs", min_generation=2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "generation_not_found")
        publish_generation(store, apis.later(2, rs="wide", new="rs"))
        answer = await apis.ask("new", {"x-loramux-min-generation": "2"}, min_generation=1)
        assert (answer.status_code, answer.headers["x-loramux-generation"]) == (200, "2")
        publish_generation(store, apis.later(3, rs="wide"))
        reported = await apis.client.complete("rs", PROMPT, max_tokens=1, min_generation=3)
        assert (reported.started.generation, reported.started.adapter_digest) == (3, apis.digest("wide"))


async def test_a_model_at_its_limit_is_refused_alone(apis: ReplicaApis) -> None:
    """The refusal is 429 for OpenAI's clients, and RESOURCE_EXHAUSTED with RetryInfo; others are answered."""
    assert (await apis.ask("all")).status_code == 200
    assert (await apis.ask("all")).status_code == 200
    refused = await apis.ask("all")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    with pytest.raises(RateLimited) as limited:
        await apis.client.complete("all", PROMPT)
    assert limited.value.retry_after_s is not None
    assert 30 < limited.value.retry_after_s <= 42
    assert (await apis.ask("rs")).status_code == 200
    apis.ready.adapters.apply(apis.generation.model_copy(update={"number": 2, "limits": Runtime().limits}))
    assert (await apis.ask("all")).status_code == 200
    scrape = Scrape((await apis.http.get("/metrics")).text)
    assert scrape.value("loramux_requests_total", model="all", outcome="RATE_LIMITED") == 2


async def test_a_key_has_its_limits_at_both_apis(world: tuple[World, MemoryStore]) -> None:
    """A key's limits hold over both APIs together; the other key is not concerned."""
    (ann, of_ann), (bob, of_bob) = new_entry("ann", "infer"), new_entry("bob", "infer")
    of_ann = of_ann.model_copy(update={"limits": Limits(tokens_per_minute=8)})
    async with opened(*world, Guard(Keyring(text=lines(of_ann, of_bob)))) as apis:
        headers = [{"authorization": f"Bearer {key}"} for key in (ann, bob)]
        assert [(await apis.ask("rs", each)).status_code for each in headers] == [200, 200]
        assert [(await apis.ask("wide", each)).status_code for each in headers] == [429, 200]
        async with AsyncClient(apis.address, api_key=ann) as client:
            with pytest.raises(RateLimited, match="the API key 'ann'"):
                await client.complete("base", PROMPT)


@pytest.mark.beside
async def test_tokens_of_a_minute_are_used_once(apis: ReplicaApis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting requests are checked again before the engine, so no token of the minute is used twice."""
    service, gate = apis.ready.service, asyncio.Event()
    change_deployed(service.local.catalog, limits=ModelLimits(default=Limits(tokens_per_minute=4)))

    async def slowly(digest: str, name: str) -> AdapterDefaults:
        await gate.wait()
        return NO_DEFAULTS

    monkeypatch.setattr(apis.ready.bank.texts, "defaults", slowly)
    service.local.catalog.know(apis.digest("rs"), defaults=None)
    waiting = [asyncio.ensure_future(apis.ask("rs")) for _ in range(3)]
    await until(lambda: service.in_work == 3, "three requests in work", lambda: service.in_work)
    gate.set()
    answers = await asyncio.gather(*waiting)
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
