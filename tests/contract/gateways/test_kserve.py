"""KServe's LLMInferenceService: its probes, and the second name of every model that its routes go by.

Source: KServe's main of October 2026, config/llmisvcconfig/*.yaml and pkg/controller/v1alpha2/llmisvc/.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from loramux_shared.access.guard import Guard
from loramux_shared.access.keyring import Keyring
from tests.support.access import lines, new_entry
from tests.support.openai_door import OpenAIDoor
from tests.support.served_replicas import Built, open_replica

HEADER = "X-Gateway-Model-Name"
"""What a route matches, and passes on."""


@pytest_asyncio.fixture
async def door(chatty: Built) -> AsyncIterator[OpenAIDoor]:
    """A replica that nobody changes."""
    async with open_replica(chatty, max_batch_seqs=1) as door:
        yield door


def published(name: str) -> str:
    """The name by which a route finds a model of the namespace `ns`."""
    return f"publishers/ns/models/{name}"


async def ask(web: httpx.AsyncClient, model: str, path: str, **headers: str) -> httpx.Response:
    """Send what the route passes on."""
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    fields = {"model": model, "temperature": 0, "max_tokens": 4}
    return await web.post(path, json=body | fields, headers={HEADER: model} | headers)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_each_model_has_both_names(door: OpenAIDoor, path: str) -> None:
    """Base and adapters answer the same under either; a name that is none is not the base's."""
    for name in ("base", "all", "rs", "wide"):
        short, long = [await ask(door.http, model, path) for model in (name, published(name))]
        assert short.json()["choices"] == long.json()["choices"]
        assert long.headers["x-loramux-model"] == name
    for nobody in (published("nobody"), "publishers/ns/rs", "publishers/n/s/models/rs", published("")):
        assert (await ask(door.http, nobody, path)).json()["error"]["code"] == "model_not_found"


async def test_a_key_for_a_model_is_one_for_both_names(chatty: Built) -> None:
    """And for no other model, under whatever name."""
    key, entry = new_entry("one", "infer", models=("rs",))
    async with open_replica(chatty, Guard(keyring=Keyring(text=lines(entry)))) as door:
        own, other = [
            await ask(door.http, published(name), "/v1/completions", authorization=f"Bearer {key}")
            for name in ("rs", "wide")
        ]
        assert (own.status_code, other.status_code) == (200, 404)


async def test_probes_are_answered_under_load(door: OpenAIDoor) -> None:
    """Startup, liveness and readiness all ask /health, each second: also while every seat is taken."""
    busy = [
        asyncio.create_task(
            door.post("/v1/completions", model=name, prompt=[5], max_tokens=200, ignore_eos=True)
        )
        for name in ("base", "all", "rs", "wide") * 2
    ]
    while not door.ready.engine.stats.waiting:
        await asyncio.sleep(0.001)
    probes = [(await door.http.get("/health")).status_code for _ in range(20)]
    assert probes == [200] * 20
    assert door.ready.engine.stats.waiting
    assert all(answer.status_code == 200 for answer in await asyncio.gather(*busy))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/responses", {"input": "hi", "max_output_tokens": 4}, "output"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}, "content"),
    ],
)
async def test_the_other_routes_are_answered(
    door: OpenAIDoor, path: str, body: dict[str, Any], said: str
) -> None:
    """Its routes know two more paths, for both names too."""
    answers = [
        await door.http.post(path, json=body | {"model": name, "temperature": 0}, headers={HEADER: name})
        for name in ("rs", published("rs"))
    ]
    assert [answer.headers["x-loramux-model"] for answer in answers] == ["rs", "rs"]
    assert _texts(answers[0].json()[said]) == _texts(answers[1].json()[said]) != []


def _texts(items: list[dict[str, Any]]) -> list[str]:
    """The texts in the content of an answer."""
    return [item["text"] if "text" in item else _texts(item["content"])[0] for item in items]
