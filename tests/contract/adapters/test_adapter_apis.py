"""Adapters through both APIs: requests of operators, controllers and trainers, and the answers to them."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from inference_service.api.http.app import create_app
from inference_service.api.rpc.adapters import SERVICE_NAME, AdapterServicer
from loramux import AsyncClient
from loramux_shared.faults import BundleCorrupt, NoBuilder, RequestInvalid
from loramux_shared.rpc.server import RpcServer
from loramux_shared.storage.memory import MemoryStore
from tests.support.servers import ANY_PORT, serve
from tests.support.services.managed_replica import ManagedReplica, digest_of, managed_replica
from tests.support.services.operated_replicas import open_builder, open_fleet
from tests.support.services.silent import silent_service
from tests.support.stores.killed import copy_store
from tests.support.tiny import World
from tests.support.waiting import bounded
from tests.support.web import web_client


@pytest.fixture
def replica() -> ManagedReplica:
    """Two adapters, a builder, and a bundle that no generation has."""
    return managed_replica(bundles=(digest_of(77),))


@pytest.fixture
async def client(replica: ManagedReplica) -> AsyncIterator[AsyncClient]:
    servicer = AdapterServicer(replica.manager)
    async with (
        serve(RpcServer(ANY_PORT, {SERVICE_NAME: servicer.register})) as server,
        AsyncClient(server.address) as client,
    ):
        yield client


@pytest.fixture
async def web(replica: ManagedReplica, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(silent_service(tmp_path, replica.names), adapters=replica.manager)
    async with web_client(app) as web:
        yield web


async def test_adapters_over_grpc(client: AsyncClient, replica: ManagedReplica) -> None:
    """Every field of a view arrives; pins, loads and rollbacks take effect."""
    replica.residency.hold(replica.adapter("one"), in_flight=2, used_s=0.0)
    one, two = await client.adapters()
    assert (one.name, one.digest, one.tier, one.residency) == ("one", digest_of(1), "device", "resident")
    assert (one.in_flight, one.num_bytes, one.resident_digest) == (2, 100, digest_of(1))
    assert one.last_used is not None
    assert (two.tier, two.residency, two.last_used) == ("store", "absent", None)
    replica.residency.fails = BundleCorrupt("two is damaged")
    pinned = await client.pin("two")
    assert (pinned.pinned, pinned.last_failure.reason) == (True, "BUNDLE_CORRUPT")
    assert not (await client.unpin("two")).pinned
    with pytest.raises(RequestInvalid, match="'base' is the base"):
        await client.pin("base")
    replica.residency.fails = None
    assert (await client.load("three", "org/three")).generation == 2
    await client.unload("three")
    assert await client.rollback_replica() == 4
    assert (await client.adapter("three")).name == "three"
    only_here = await client.load("mine", f"bundle:{digest_of(77)}")
    assert only_here.only_here


async def test_a_replica_is_watched_over_grpc(client: AsyncClient, replica: ManagedReplica) -> None:
    """The state at once, then a new generation."""
    watch = client.watch_replica()
    assert ((await anext(watch)).generation, (await client.replica()).deployment) == (1, "demo")
    await client.load("three", "org/three")
    assert (await anext(watch)).generation == 2
    await watch.aclose()


async def test_vllms_words_are_used(web: httpx.AsyncClient) -> None:
    """Exactly 200 and vLLM's sentence; a taken name is 400 with the type and words that clients look for."""
    body = {"lora_name": "three", "lora_path": "hf://org/three", "load_inplace": False}
    answer = await web.post("/v1/load_lora_adapter", json=body)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'three' added successfully.")
    assert answer.headers["x-loramux-generation"] == "2"
    taken = await web.post("/v1/load_lora_adapter", json=body)
    parsed = taken.json()
    assert (taken.status_code, parsed["type"], parsed["code"]) == (400, "InvalidUserInput", 400)
    assert "has already been loaded" in parsed["message"]
    assert parsed["error"]["code"] == "adapter_exists"
    again = await web.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
    assert again.status_code == 200
    assert again.headers["x-loramux-digest"] != answer.headers["x-loramux-digest"]
    listed = {each["id"]: each for each in (await web.get("/v1/models")).json()["data"]}
    assert listed["three"]["digest"] == again.headers["x-loramux-digest"]
    assert listed["three"]["parent"] == "base"
    gone = await web.post("/v1/unload_lora_adapter", json={"lora_name": "three"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'three' removed successfully.")
    missing = await web.post("/v1/unload_lora_adapter", json={"lora_name": "three"})
    assert (missing.status_code, missing.json()["type"]) == (404, "NotFoundError")


async def test_without_a_builder_the_cure_is_named(tmp_path: Path) -> None:
    """A load without a builder is 400 with the cure, in our own error beside vLLM's."""
    app = create_app(silent_service(tmp_path), adapters=managed_replica(builder=False).manager)
    async with web_client(app) as web:
        answer = await web.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "org/x"})
    assert answer.status_code == 400
    assert "--builder" in answer.json()["message"]
    assert answer.json()["error"]["code"] == NoBuilder.reason.lower()


async def test_the_page_lists_pins_and_rolls_back(web: httpx.AsyncClient, replica: ManagedReplica) -> None:
    """The page gets JSON, in pages."""
    first = (await web.get("/v1/adapters", params={"page_size": 1})).json()
    assert ([each["id"] for each in first["data"]], first["replica"]["registered"]) == (["one"], 2)
    rest = (await web.get("/v1/adapters", params={"page_token": first["next_page_token"]})).json()
    assert ([each["id"] for each in rest["data"]], rest["next_page_token"]) == (["two"], "")
    assert (await web.post("/v1/adapters/one/pin")).json()["pinned"]
    models = (await web.get("/v1/models")).json()["data"]
    assert {each["id"]: each["tier"] for each in models} == {"base": "device", "one": "device", "two": "store"}
    assert not (await web.post("/v1/adapters/one/unpin")).json()["pinned"]
    await replica.manager.load("one", "org/bad", replace=True)
    assert (await web.post("/v1/rollback", json={})).json() == {"generation": 3}
    assert replica.manager.get("one").digest == digest_of(1)


async def test_a_page_of_another_site_changes_nothing(web: httpx.AsyncClient, replica: ManagedReplica) -> None:
    """A browser's own statement counts where there is no body that it would ask about first."""
    for path in ("/v1/adapters/one/pin", "/v1/adapters/one/unpin"):
        answer = await web.post(path, headers={"sec-fetch-site": "cross-site"})
        assert answer.status_code == 403, path
    assert replica.residency.calls == []


async def test_a_load_goes_through_the_builder_to_every_replica(
    chatty: tuple[World, MemoryStore], tmp_path: Path
) -> None:
    """An adapter that one replica loads is served by the other one, until either unloads it."""
    world = chatty[0], copy_store(chatty[1])
    async with open_builder(world, tmp_path) as builder, open_fleet(world, 2, builder=builder) as (one, other):

        async def status() -> int:
            return (await other.post("/v1/completions", model="new", prompt=[5], max_tokens=1)).status_code

        source = str(world[0].adapters["rs"])
        loaded = await one.post("/v1/load_lora_adapter", lora_name="new", lora_path=source)
        assert loaded.status_code == 200, loaded.text
        async with bounded("the other replica"):
            while await status() != 200:
                pass
        refused = await one.post("/v1/load_lora_adapter", lora_name="lost", lora_path="/nowhere/at/all")
        assert "not below a folder" in refused.json()["message"]
        assert (await other.post("/v1/unload_lora_adapter", lora_name="new")).status_code == 200
        assert await status() == 404
        assert (await other.post("/v1/rollback")).json() == {"generation": 4}
        assert await status() == 200
        assert (await other.post("/v1/rollback", to=2)).json() == {"generation": 4}  # that is served, not 3
        assert await status() == 200
