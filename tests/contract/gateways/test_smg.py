"""The Shepherd Model Gateway itself, from PyPI, with two replicas as its HTTP workers."""

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from tests.contract.gateways.smg import running_smg
from tests.support.services.operated_replicas import Built, open_fleet
from tests.support.waiting import BOUND_S, bounded, until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
ADAPTER: dict[str, Any] = {"extra_body": {"lora_path": "rs"}}
"""The gateway knows the first model of a worker, which is the base: an adapter of it is asked for like this."""
FLAGS = (
    *("--policy", "power_of_two", "--power-of-two-load-metric", "requests"),
    "--disable-tokenizer-autoload",
)
HELLO: Any = [{"role": "user", "content": "hello"}]


async def ready(web: httpx.AsyncClient, required: int) -> list[dict[str, Any]]:
    """Wait until so many workers are ready, and their load is known."""
    async with bounded(f"{required} workers that are ready"):
        while True:
            workers = (await web.get("/workers")).json()["workers"]
            found = [each for each in workers if each["status"] == "ready"]
            if len(found) == required and all(each.get("engine_load") for each in found):
                return found
            await asyncio.sleep(0.05)


async def test_smg_in_front_of_two_replicas(chatty: Built, tmp_path: Path) -> None:
    """SMG answers as a replica does, reads the replicas' own records, and bridges the drain of one."""
    async with (
        open_fleet(chatty, 2) as apis,
        running_smg(tmp_path, [api.url for api in apis], *FLAGS) as url,
        httpx.AsyncClient(base_url=url, timeout=BOUND_S) as web,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=BOUND_S) as through,
    ):
        version = (await apis[0].http.get("/version")).json()["version"]
        for worker in await ready(web, 2):
            assert (worker["model_id"], worker["runtime_type"]) == ("base", "vllm")
            assert worker["labels"]["version"] == version
            assert worker["models"][0]["context_length"] == 256
            [load] = worker["engine_load"]["loads"]
            assert load["max_total_num_tokens"] == 16_384
            assert load["max_running_requests"] == apis[0].ready.engine.stats.seats

        direct = apis[0].openai
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

        numbers, answers = count(), [set[str](), set[str]()]
        answered = 0

        async def ask() -> None:
            nonlocal answered
            while (number := next(numbers)) < 120:
                more = ADAPTER if number % 2 else {}
                chat = await through.chat.completions.create(model="base", messages=HELLO, **GREEDY, **more)
                answers[number % 2].add(str(chat.choices[0].message.content))
                answered += 1

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        await until(lambda: answered > 20, "answers before the drain")
        assert await apis[0].server.drain(BOUND_S)
        await asyncio.gather(*asking)
        assert [len(texts) for texts in answers] == [1, 1]
        assert [worker["url"] for worker in await ready(web, 1)] == [apis[1].url]
