"""AIBrix's adapter controller against replicas that share a builder."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from inference_service.serving.adapters.paths import repository_of
from loramux_shared.access.guard import Guard
from loramux_shared.deployment import SourceKind
from tests.contract.gateways.aibrix import LABELS, TRIES, Controller, LoadingFailed, ModelAdapter, Pod
from tests.support.access import keyring
from tests.support.openai_door import OpenAIDoor
from tests.support.served_replicas import Built, copied, open_builder, open_fleet, open_replica

KEYS, RING = keyring("admin", "infer")
LOAD = "POST /v1/load_lora_adapter"


@pytest.fixture
def changing(chatty: Built) -> Built:
    """The world with a store of its own."""
    return copied(chatty)


@pytest_asyncio.fixture
async def controller() -> AsyncIterator[Controller]:
    """A controller, and what it sent."""
    async with httpx.AsyncClient() as web:
        yield Controller(web)


@pytest_asyncio.fixture
async def fleet(changing: Built, tmp_path: Path) -> AsyncIterator[list[OpenAIDoor]]:
    """Two replicas with one builder."""
    async with open_builder(changing, tmp_path) as builder, open_fleet(changing, 2, builder=builder) as doors:
        yield doors


async def until_listed(door: OpenAIDoor, name: str, *, listed: bool = True) -> None:
    """Wait until a replica lists a name, or does not."""
    for _ in range(500):
        if (name in {each["id"] for each in (await door.http.get("/v1/models")).json()["data"]}) == listed:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{name} never was {'' if listed else 'not '}listed")


async def test_an_adapter_comes_to_every_pod_and_leaves(
    fleet: list[OpenAIDoor], controller: Controller, chatty: Built
) -> None:
    """Listed first, loaded once for all replicas, taken for loaded where it is present; then unloaded."""
    adapter = ModelAdapter("fresh", str(chatty[0].adapters["rs"]))
    first, second = (Pod(door.url) for door in fleet)
    await controller.reconcile(adapter, [first])
    assert controller.calls == ["GET /v1/models", LOAD]
    await until_listed(fleet[1], "fresh")
    await controller.reconcile(adapter, [first, second])
    assert controller.calls[2:] == ["GET /v1/models"] * 2
    assert adapter.instances == [first, second]
    for door in fleet:
        asked = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
        fresh, rs = [
            (await door.post("/v1/completions", model=name, **asked)).json() for name in ("fresh", "rs")
        ]
        assert fresh["choices"] == rs["choices"]
    await controller.delete(adapter)
    for door in fleet:
        await until_listed(door, "fresh", listed=False)
    assert controller.calls[4:] == ["POST /v1/unload_lora_adapter"] * 2


async def test_labels_change(fleet: list[OpenAIDoor], controller: Controller, chatty: Built) -> None:
    """A pod that is no longer selected keeps its adapter and is not called; a selected one is looked at."""
    adapter = ModelAdapter("fresh", str(chatty[0].adapters["rs"]))
    pods = [Pod(door.url) for door in fleet]
    del pods[0].labels["adapter.model.aibrix.ai/enabled"]
    await controller.reconcile(adapter, pods)
    assert adapter.instances == [pods[1]]
    await until_listed(fleet[0], "fresh")
    controller.calls.clear()
    pods[0].labels |= LABELS
    pods[1].labels["model.aibrix.ai/name"] = "another"
    await controller.reconcile(adapter, pods)
    assert (controller.calls, adapter.instances) == (["GET /v1/models"], [pods[0]])


async def test_what_the_engine_lost_comes_back(
    fleet: list[OpenAIDoor], controller: Controller, chatty: Built
) -> None:
    """An adapter that somebody else unloaded is loaded again at the next look."""
    adapter, pod = ModelAdapter("fresh", str(chatty[0].adapters["rs"])), Pod(fleet[0].url)
    await controller.reconcile(adapter, [pod])
    await fleet[0].post("/v1/unload_lora_adapter", lora_name="fresh")
    await controller.reconcile(adapter, [pod])
    assert controller.calls.count(LOAD) == 2


async def test_a_late_artifact_is_found_at_a_later_try(
    fleet: list[OpenAIDoor], controller: Controller, chatty: Built
) -> None:
    """Loads fail by name until the folder is there; the next of the five tries brings it."""
    late = chatty[0].root / "late"
    adapter = ModelAdapter("late", str(late))
    pod = Pod(fleet[0].url)
    with pytest.raises(LoadingFailed, match="late"):
        await controller.reconcile(adapter, [pod])
    assert controller.calls == ["GET /v1/models", LOAD] * TRIES
    shutil.copytree(chatty[0].adapters["rs"], late)
    await controller.reconcile(adapter, [pod])
    assert adapter.instances == [pod]
    shutil.rmtree(late)


async def test_its_key_is_one_of_admin(changing: Built, tmp_path: Path, controller: Controller) -> None:
    """Both calls show the same key; one that may only ask is told which scope it wants, five times."""
    async with (
        open_builder(changing, tmp_path) as builder,
        open_replica(changing, Guard(keyring=RING), builder=builder) as door,
    ):
        source = str(changing[0].adapters["rs"])
        with pytest.raises(LoadingFailed, match="admin"):
            await controller.reconcile(
                ModelAdapter("fresh", source, {"api-key": KEYS["infer"]}), [Pod(door.url)]
            )
        adapter = ModelAdapter("fresh", source, {"api-key": KEYS["admin"]})
        await controller.reconcile(adapter, [Pod(door.url)])
        assert len(adapter.instances) == 1


@pytest.mark.parametrize(
    ("arrives", "kind", "repo"),
    [
        ("s3://bucket/lora", SourceKind.S3, "s3://bucket/lora"),
        ("gcs://bucket/lora", SourceKind.GCS, "gs://bucket/lora"),
        ("hf://org/lora", SourceKind.HF, "org/lora"),
        ("org/lora", SourceKind.HF, "org/lora"),
        ("/models/lora", SourceKind.LOCAL, "/models/lora"),
    ],
)
def test_every_url_that_it_allows_names_a_repository(arrives: str, kind: SourceKind, repo: str) -> None:
    """As they arrive: unchanged, but for huggingface://, which it takes off."""
    named = repository_of(arrives)
    assert (named.source, named.repo) == (kind, repo)
