"""Replicas with a builder and a hub: requests for adapters that nobody registered."""

import asyncio
from pathlib import Path

from loramux_shared.bundle.deployments import require_deployment
from tests.support.hub import HubRepo, serve_hub
from tests.support.openai_api import OpenAIApi, openai_world
from tests.support.served_replicas import open_builder, open_fleet


async def ask(api: OpenAIApi, model: str, *, stream: bool = False) -> tuple[int, str]:
    """Return status and text of a short answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    answer = await api.post("/v1/chat/completions", **body, stream=stream)
    return answer.status_code, answer.text if stream or answer.is_error else answer.json()["choices"][0][
        "message"
    ]["content"]


async def test_two_replicas_add_each_adapter_once(tmp_path: Path) -> None:
    """Requests of both at the same moment wait for one download, and answer as the registered twin does."""
    world = openai_world(tmp_path / "world", built=False)
    twin = next(iter(world[0].adapters))
    world[0].build_with(world[1], runtime={"resolve": {"sources": ["hf:lab/*"]}})
    files = {path.name: path.read_bytes() for path in world[0].adapters[twin].iterdir()}
    with serve_hub() as hub:
        hub.repos["lab/twin"] = HubRepo({"main": "c" * 40, "v1": "d" * 40}, files)
        hub.repos["lab/broken"] = HubRepo({"main": "e" * 40}, {"README.md": b"nothing"})
        async with (
            open_builder(world, tmp_path / "work", hub_endpoint=hub.endpoint) as builder,
            open_fleet(world, 2, builder=builder) as replicas,
        ):
            expected = await ask(replicas[0], twin)
            calls = [ask(api, "lab/twin") for api in replicas for _ in range(4)]
            assert await asyncio.gather(*calls) == [expected] * 8
            assert hub.downloaded().count("adapter_model.safetensors") == 1
            assert (await ask(replicas[1], "lab/twin@v1")) == expected
            status, body = await ask(replicas[0], "lab/broken")
            assert (status, "adapter_config.json" in body) == (400, True), body
            assert (await ask(replicas[0], "lab/absent"))[0] == 404
            assert (await ask(replicas[0], "other/twin"))[0] == 404
            assert (await ask(replicas[0], "lab/twin", stream=True))[0] == 200
    names = set(require_deployment(world[1], "tiny").adapters)
    assert names == {*world[0].adapters, "lab:twin", "lab:twin:v1"}
