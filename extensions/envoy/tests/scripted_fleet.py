"""Scripted replicas behind the real Envoy, and clients of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from loramux import AsyncClient
from loramux_envoy.config import Tls
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from tests.fleet import Proxy, fleet_of
from tests.scripted_replica import ScriptedReplica
from tests.support.waiting import BOUND_S, until


class Fleet:
    """Three replicas, Envoy, and its clients."""

    def __init__(self, folder: Path, guard: Guard = NOBODY_GUARDS) -> None:
        self.replicas = {name: ScriptedReplica(folder, name, guard) for name in ("one", "two", "three")}
        self.folder = folder

    async def start(self, host: str = "127.0.0.1", tls: Tls | None = None, first_token_s: float = 600) -> None:
        """Listen; Envoy finds the replicas by a name of this machine."""
        await asyncio.gather(*(replica.start() for replica in self.replicas.values()))
        apis = [tuple(api.replace("127.0.0.1", host) for api in each.apis) for each in self.replicas.values()]
        self.proxy = Proxy(fleet_of(apis, tls=tls), self.folder, first_token_s)
        self.client = AsyncClient(self.proxy.grpc)
        self.web = httpx.AsyncClient(base_url=self.proxy.url, timeout=BOUND_S)
        self.openai = AsyncOpenAI(
            base_url=f"{self.proxy.url}/v1", api_key="none", max_retries=0, timeout=BOUND_S
        )
        await asyncio.to_thread(self.proxy.start)

    async def stop(self) -> None:
        for replica in self.replicas.values():
            replica.service.tokens.set()
            replica.service.ends.set()
        await self.client.close()
        await self.web.aclose()
        await self.openai.close()
        self.proxy.stop()
        await asyncio.gather(*(replica.drain() for replica in self.replicas.values()))

    async def idle(self) -> None:
        """Have every replica answer as it does at first, and wait until none of them answers."""
        for replica in self.replicas.values():
            replica.service.refuses = None
            replica.service.tokens.set()
        await until(
            lambda: not any(each.service.open for each in self.replicas.values()),
            "replicas without a request",
            lambda: {name: each.service.open for name, each in self.replicas.items()},
        )
        await asyncio.to_thread(self.proxy.until_healthy, 2 * len(self.replicas))
        await asyncio.to_thread(self.proxy.forget)

    async def replica_of(self, model: str) -> str:
        """The replica that answers a model over gRPC."""
        return (await self.client.complete(model, "HELLO")).text

    async def who_over_http(self, model: str, **more: object) -> str:
        """The same of OpenAI's API."""
        answer = await self.web.post("/v1/completions", json={"model": model, "prompt": "HELLO"} | more)
        return str(answer.json()["choices"][0]["text"])

    async def streamed(self, model: str) -> str:
        """The same of a stream of OpenAI's API."""
        stream = await self.openai.completions.create(model=model, prompt="HELLO", stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])


@asynccontextmanager
async def behind_envoy(made: Fleet, **options: Any) -> AsyncIterator[Fleet]:
    try:
        await made.start(**options)
        yield made
    finally:
        await made.stop()


@asynccontextmanager
async def envoy_of(*apis: tuple[str, str], folder: Path, **options: Any) -> AsyncIterator[Proxy]:
    """Run Envoy before servers of this event loop, whether it takes them for replicas or not."""
    made = Proxy(fleet_of(apis, **options), folder)
    try:
        await asyncio.to_thread(made.start, healthy="tls" not in options)
        yield made
    finally:
        made.stop()
