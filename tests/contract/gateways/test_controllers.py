"""Adapter controllers of AIBrix and of vLLM's production-stack, against two replicas that share a builder."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
import pytest_asyncio

from inference_service.adapters.changing import repository_of
from loramux_shared.access.guard import Guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.deployment import SourceKind
from tests.contract.gateways.controllers import LABELS, AIBrix, LoadingFailed, LoraController, ModelAdapter, Pod
from tests.support.access import lines, new_entry
from tests.support.openai_api import OpenAIApi
from tests.support.served_replicas import Built, copied, open_builder, open_fleet, open_replica
from tests.support.waiting import BOUND_S, bounded

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIST, LOAD, UNLOAD = "GET /v1/models", "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"


@dataclass
class Fleet:
    """Two replicas, the builder that they ask, and a client without an address of its own."""

    world: Built
    builder: str
    apis: list[OpenAIApi]
    web: httpx.AsyncClient

    async def until_listed(self, *names: str) -> None:
        """Wait until both replicas list these adapters beside the base and no other ones."""
        for api in self.apis:
            async with bounded(f"a replica that lists {names}"):
                while sorted(names) != await self.listed(api):
                    pass

    async def listed(self, api: OpenAIApi) -> list[str]:
        """The adapters that a replica lists."""
        data = (await api.http.get("/v1/models")).json()["data"]
        return sorted(each["id"] for each in data if each["id"] != "base")


USUAL = ("all", "rs", "wide")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(chatty: Built, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """The replicas, with a store of their own."""
    world = copied(chatty)
    async with (
        open_builder(world, tmp_path_factory.mktemp("builder")) as builder,
        open_fleet(world, 2, builder=builder) as apis,
        httpx.AsyncClient(timeout=BOUND_S) as web,
    ):
        yield Fleet(world, builder, apis, web)


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(started: Fleet) -> AsyncIterator[Fleet]:
    """The replicas, with the adapters that they have at first."""
    await started.until_listed(*USUAL)
    yield started
    for name in set(await started.listed(started.apis[0])) - set(USUAL):
        await started.apis[0].post("/v1/unload_lora_adapter", lora_name=name)


async def test_aibrix_brings_an_adapter_to_every_pod(fleet: Fleet) -> None:
    """The adapter is loaded once for all replicas, and again when another client unloaded it.

    It is found on the second replica, which is not called while no label selects it; then it is unloaded.
    """
    controller, source = AIBrix(fleet.web), str(fleet.world[0].adapters["rs"])
    adapter, pods = ModelAdapter("fresh", source), [Pod(api.url) for api in fleet.apis]
    del pods[1].labels["model.aibrix.ai/name"]
    await controller.reconcile(adapter, pods)
    assert controller.calls == [LIST, LOAD]
    await fleet.until_listed("fresh", *USUAL)
    pods[1].labels |= LABELS
    await controller.reconcile(adapter, pods)
    assert (controller.calls[2:], adapter.instances) == ([LIST] * 2, pods)
    for api in fleet.apis:
        requests = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
        fresh, rs = [
            (await api.post("/v1/completions", model=name, **requests)).json() for name in ("fresh", "rs")
        ]
        assert fresh["choices"] == rs["choices"]
    await fleet.apis[0].post("/v1/unload_lora_adapter", lora_name="fresh")
    await fleet.until_listed(*USUAL)
    await controller.reconcile(adapter, pods[:1])
    assert controller.calls[4:] == [LIST, LOAD]
    adapter.instances = pods
    await controller.delete(adapter)
    await fleet.until_listed(*USUAL)
    assert controller.calls[6:] == [UNLOAD] * 2


async def test_production_stack_brings_an_adapter_to_both(fleet: Fleet) -> None:
    """Loads at both replicas are taken for done, and one from elsewhere is refused by name."""
    controller, source = LoraController(fleet.web), str(fleet.world[0].adapters["rs"])
    for api in fleet.apis:
        await controller.load(api.url, "fresh", source)
        assert (await controller.registrations(api.url))["fresh"].startswith("rs@")
    with pytest.raises(LoadingFailed, match="not below a folder"):
        await controller.load(fleet.apis[0].url, "lost", "/nowhere/at/all")
    await controller.unload(fleet.apis[0].url, "fresh")
    assert "fresh" not in await controller.registrations(fleet.apis[0].url)


async def test_keys_of_gateways(fleet: Fleet) -> None:
    """A load wants a key of the scope admin, and a key for one model opens it under KServe's name too."""
    (admin, first), (infer, second) = new_entry("a", "admin"), new_entry("b", "infer", models=("rs",))
    guard = Guard(keyring=Keyring(text=lines(first, second)))
    source = str(fleet.world[0].adapters["rs"])
    async with open_replica(fleet.world, guard, builder=fleet.builder) as api:
        controller, pod = AIBrix(fleet.web), Pod(api.url)
        with pytest.raises(LoadingFailed, match="admin"):
            await controller.reconcile(ModelAdapter("fresh", source, infer), [pod])
        adapter = ModelAdapter("fresh", source, admin)
        await controller.reconcile(adapter, [pod])
        assert adapter.instances == [pod]
        own, other = [
            await api.http.post(
                "/v1/completions",
                json={"model": f"publishers/ns/models/{name}", "prompt": "hi", "max_tokens": 2},
                headers={"authorization": f"Bearer {infer}"},
            )
            for name in ("rs", "wide")
        ]
        assert (own.status_code, other.status_code) == (200, 404)
    await fleet.until_listed("fresh", *USUAL)


async def test_every_url_that_aibrix_allows_names_a_repository() -> None:
    """URLs arrive unchanged, but for huggingface://, which AIBrix takes off."""
    for arrives, kind, repo in (
        ("s3://bucket/lora", SourceKind.S3, "s3://bucket/lora"),
        ("gcs://bucket/lora", SourceKind.GCS, "gs://bucket/lora"),
        ("hf://org/lora", SourceKind.HF, "org/lora"),
        ("org/lora", SourceKind.HF, "org/lora"),
        ("/models/lora", SourceKind.LOCAL, "/models/lora"),
    ):
        named = repository_of(arrives)
        assert (named.source, named.repo) == (kind, repo)
