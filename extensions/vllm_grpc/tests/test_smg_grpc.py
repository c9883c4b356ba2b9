"""SMG over gRPC: it makes tokens of text, and ports of ours stand for one model each."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from inference_service.http.server import HttpServer
from tests.support.served_replicas import Built
from tests.support.smg import running_smg
from tests.support.waiting import BOUND_S, bounded
from tests.vllm_apis import MODEL, VllmApis, open_apis

pytestmark = [pytest.mark.sweep, pytest.mark.asyncio(loop_scope="module")]
HELLO: Any = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@dataclass(frozen=True)
class Gateway:
    """The gateway, what is behind it, and the same replica without it."""

    apis: VllmApis
    web: httpx.AsyncClient
    through: AsyncOpenAI
    direct: AsyncOpenAI

    async def both(self, **body: Any) -> list[Any]:
        """The answers to a chat, without the gateway and through it."""
        clients = (self.direct, self.through)
        return [await each.chat.completions.create(**({"messages": HELLO} | GREEDY | body)) for each in clients]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(chatty: Built, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """A gateway that knows the base by one port and an adapter by the other."""
    folder: Path = tmp_path_factory.mktemp("smg")
    async with open_apis(chatty) as apis:
        http = HttpServer("127.0.0.1:0", apis.ready.service)
        await http.start()
        workers = [f"grpc://{address}" for address in apis.addresses]
        async with (
            running_smg(folder, workers, "--policy", "round_robin") as url,
            httpx.AsyncClient(base_url=url, timeout=BOUND_S) as web,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=BOUND_S) as through,
            AsyncOpenAI(
                base_url=f"http://{http.address}/v1", api_key="none", max_retries=0, timeout=BOUND_S
            ) as direct,
        ):
            gateway = Gateway(apis, web, through, direct)
            await until_known(gateway.web, "base", MODEL)
            yield gateway
        await http.drain(1)


async def until_known(web: httpx.AsyncClient, *models: str) -> None:
    """Wait until these are the models of its ready workers, and their tokenizers are there."""
    async with bounded(f"workers of {models}"):
        while True:
            workers = (await web.get("/workers")).json()["workers"]
            ready = sorted(worker["model_id"] for worker in workers if worker["status"] == "ready")
            tokenizers = (await web.get("/v1/tokenizers")).json()["tokenizers"]
            if ready == sorted(models) and {each["name"] for each in tokenizers} >= set(models):
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("model", ["base", MODEL])
async def test_answers_are_those_of_the_replica(gateway: Gateway, model: str) -> None:
    """Greedy and drawn, with several, log probabilities, stops and schemas: the same, token for token."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    stop = (await gateway.direct.chat.completions.create(model=model, messages=HELLO, **GREEDY)).choices[0]
    assert stop.message.content
    bodies: list[dict[str, Any]] = [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"temperature": 1, "seed": 4, "n": 2},
        {"stop": [stop.message.content[4:6]]},
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            "max_tokens": 60,
        },
    ]
    for body in bodies:
        direct, through = await gateway.both(model=model, **body)
        assert through.model == direct.model == model
        assert through.usage.completion_tokens == direct.usage.completion_tokens
        assert through.usage.prompt_tokens == direct.usage.prompt_tokens
        for ours, theirs in zip(direct.choices, through.choices, strict=True):
            assert (theirs.message.content, theirs.finish_reason) == (ours.message.content, ours.finish_reason)
            if body.get("logprobs"):
                emitted, real = (
                    {each.token: each.logprob for each in one.logprobs.content} for one in (theirs, ours)
                )
                assert emitted == pytest.approx(real, abs=1e-5)
