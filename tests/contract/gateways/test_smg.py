"""The Shepherd Model Gateway itself, from PyPI, with two replicas as its HTTP workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest_asyncio
from openai import AsyncOpenAI

from tests.support.openai_door import OpenAIDoor
from tests.support.served_replicas import Built, open_fleet
from tests.support.smg import running_smg

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
ADAPTER: dict[str, Any] = {"extra_body": {"lora_path": "rs"}}
"""The gateway knows the first model of a worker, which is the base: an adapter of it is asked for like this."""
FLAGS = (
    *("--policy", "power_of_two", "--power-of-two-load-metric", "requests"),
    "--disable-tokenizer-autoload",
)
HELLO: Any = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Gateway:
    """A running gateway, and what is behind it."""

    web: httpx.AsyncClient
    openai: AsyncOpenAI
    doors: list[OpenAIDoor]

    async def workers(self) -> list[dict[str, Any]]:
        """What it knows of its workers."""
        return list((await self.web.get("/workers")).json()["workers"])

    async def until(self, ready: int) -> list[dict[str, Any]]:
        """Wait until so many workers are ready, and their load is known."""
        for _ in range(1200):
            found = [each for each in await self.workers() if each["status"] == "ready"]
            if len(found) == ready and all(each.get("engine_load") for each in found):
                return found
            await asyncio.sleep(0.05)
        raise AssertionError(f"{ready} workers were never ready")


@pytest_asyncio.fixture
async def gateway(chatty: Built, tmp_path: Path) -> AsyncIterator[Gateway]:
    """The gateway in front of two replicas, once it knows both."""
    async with (
        open_fleet(chatty, 2) as doors,
        running_smg(tmp_path, [door.url for door in doors], *FLAGS) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as web,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as openai,
    ):
        gateway = Gateway(web, openai, doors)
        await gateway.until(2)
        yield gateway


async def test_answers_are_those_of_a_replica(gateway: Gateway) -> None:
    """Chat, completions and streams of base and adapter, through the gateway and without it, are the same."""
    direct, through = gateway.doors[0].openai, gateway.openai
    for more, name in (({}, "base"), (ADAPTER, "rs")):
        chats = [
            await each.chat.completions.create(model="base", messages=HELLO, **GREEDY, **more)
            for each in (direct, through)
        ]
        assert chats[0].choices == chats[1].choices
        assert {chat.model for chat in chats} == {name}
        plain = [
            await each.completions.create(model="base", prompt="hello", **GREEDY, **more)
            for each in (direct, through)
        ]
        assert plain[0].choices == plain[1].choices
        stream = await through.chat.completions.create(
            model="base", messages=HELLO, stream=True, **GREEDY, **more
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert len(pieces) > 2
        assert "".join(pieces) == chats[0].choices[0].message.content


async def test_it_knows_the_workers(gateway: Gateway) -> None:
    """Name, version, length and load are what the replicas say of themselves; it asks /loads, not /metrics."""
    for worker in await gateway.until(2):
        assert worker["model_id"] == "base"
        assert worker["runtime_type"] == "vllm"
        assert worker["labels"]["version"] == (await gateway.doors[0].http.get("/version")).json()["version"]
        assert worker["models"][0]["context_length"] == 256
        [load] = worker["engine_load"]["loads"]
        assert load["max_total_num_tokens"] == 16_384
        assert load["max_running_requests"] == gateway.doors[0].ready.engine.stats.seats


async def test_the_load_is_told_in_both_places(chatty: Built) -> None:
    """Running, waiting, seats and tokens of the cache, at the two paths that the gateway tries."""
    async with open_fleet(chatty, 1, max_batch_seqs=1) as [door]:
        busy = [
            asyncio.create_task(
                door.post("/v1/completions", model="rs", prompt=[5] * 40, max_tokens=200, ignore_eos=True)
            )
            for _ in range(2)
        ]
        while not door.ready.engine.stats.waiting:
            await asyncio.sleep(0.001)
        for path in ("/loads?model=base", "/v1/loads?include=core,disagg,queues,memory"):
            [load] = (await door.http.get(path)).json()["loads"]
            assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_total_reqs"]) == (1, 1, 2)
            assert (load["max_running_requests"], load["utilization"]) == (1, 1)
            assert 40 <= load["num_used_tokens"] <= load["max_total_num_tokens"]
            assert load["token_usage"] == load["num_used_tokens"] / load["max_total_num_tokens"]
        await asyncio.gather(*busy)


async def test_a_worker_stops(gateway: Gateway) -> None:
    """Of 120 requests around a drain none fails, and afterwards the gateway knows that one worker is left."""

    async def ask(number: int) -> str:
        await asyncio.sleep(number / 100)
        more = ADAPTER if number % 2 else {}
        chat = await gateway.openai.chat.completions.create(model="base", messages=HELLO, **GREEDY, **more)
        return str(chat.choices[0].message.content)

    asking = [asyncio.create_task(ask(number)) for number in range(120)]
    await asyncio.sleep(0.4)
    assert await gateway.doors[0].server.drain(20)
    answers = await asyncio.gather(*asking)
    assert len(set(answers[::2])) == len(set(answers[1::2])) == 1
    assert [worker["url"] for worker in await gateway.until(1)] == [gateway.doors[1].url]
