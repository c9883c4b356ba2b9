"""A running HTTP API in front of a tiny real model."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from openai import AsyncOpenAI

from inference_service.api.http.server import HttpServer
from inference_service.startup.load import Ready
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.storage.memory import MemoryStore
from tests.support.servers import ANY_PORT, serve
from tests.support.service import until_free
from tests.support.tiny import World, make_world
from tests.support.waiting import BOUND_S

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}({{ call.function.name }}{{ call.function.arguments | tojson }})"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


class ServedApi:
    """A server and clients of it."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.url = f"http://{server.address}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=BOUND_S)
        self.openai = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=BOUND_S)

    async def close(self) -> None:
        await self.http.aclose()
        await self.openai.close()

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)


class OpenAIApi(ServedApi):
    """A served API with an engine."""

    def __init__(self, ready: Ready, server: HttpServer) -> None:
        super().__init__(server)
        self.ready = ready

    async def events(self, path: str, **body: Any) -> list[str]:
        """Send a body that asks for a stream, and return the payload of each ``data:``."""
        async with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            raw = (await response.aread()).decode()
        assert raw.endswith("\n\n")
        parts = raw.removesuffix("\n\n").split("\n\n")
        assert all(part.startswith("data: ") and "\n" not in part for part in parts)
        return [part.removeprefix("data: ") for part in parts]

    async def chunks(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Return the objects of a stream that ends well."""
        *events, done = await self.events(path, **body)
        assert done == "[DONE]"
        return [json.loads(event) for event in events]

    async def until_free(self) -> None:
        """Wait until the engine holds no sequence."""
        await until_free(self.ready)


def openai_world(folder: Path, *, built: bool = True) -> tuple[World, MemoryStore]:
    """Make a tiny model with a chat template and adapters, and build them."""
    world = make_world(folder)
    (world.base / "chat_template.jinja").write_text(TEMPLATE)
    store = MemoryStore()
    if built:
        world.build(store)
    return world, store


@asynccontextmanager
async def open_api(
    world: tuple[World, MemoryStore], guard: Guard = NOBODY_GUARDS, **settings: Any
) -> AsyncIterator[OpenAIApi]:
    async with serve_ready(world[0].load(world[1], **({"stream_interval_ms": 0} | settings)), guard) as api:
        yield api


@asynccontextmanager
async def serve_ready(ready: Ready, guard: Guard = NOBODY_GUARDS) -> AsyncIterator[OpenAIApi]:
    """Run the engine and the HTTP API of a loaded service."""
    ready.engine.start()
    try:
        async with serve(HttpServer(ANY_PORT, ready.service, guard)) as server:
            api = OpenAIApi(ready, server)
            try:
                yield api
            finally:
                await api.close()
                vars(api).clear()  # pytest keeps it for a while, and threads of the model with it
    finally:
        await ready.engine.stop()


def assert_close(found: Any, required: Any) -> None:
    """Check that numbers about 1 agree within what layers round in float32, in any order of sums."""
    np.testing.assert_allclose(np.array(found, np.float32), required, atol=3e-5, rtol=1e-5)


async def answer_of(api: OpenAIApi, path: str, **body: Any) -> dict[str, Any]:
    answer = await api.post(path, **body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())
