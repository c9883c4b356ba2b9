"""An adapter with weights that overflow, over HTTP: its answers fail by name, others stay the same."""

from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from loramux_shared.storage.memory import MemoryStore
from tests.support.openai_api import OpenAIApi
from tests.support.served_replicas import open_replica
from tests.support.tiny import ADAPTERS, SIZES, World, make_world_of

BAD = "bad"
TIMES = 1e12
"""Factor of A and of B: products of queries and keys are beyond float32."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    adapters = {"all": ADAPTERS["all"], BAD: ADAPTERS["all"]}
    world = make_world_of(tmp_path_factory.mktemp("overflow"), LlamaConfig(**SIZES), adapters)
    file = world.adapters[BAD] / "adapter_model.safetensors"
    save_file({name: tensor * TIMES for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    store = MemoryStore()
    world.build(store)
    return world, store


async def ask(api: OpenAIApi, model: str, path: str = "completions", **fields: Any) -> tuple[int, Any]:
    """Return status and body."""
    body = {"model": model, "prompt": [5, 6, 7] * 9, "max_tokens": 6, "temperature": 0} | fields
    if path == "embeddings":
        body = {"model": model, "input": [5, 6, 7] * 9}
    response = await api.http.post(f"/v1/{path}", json=body)
    return response.status_code, response.json() if not fields else response.text


def reason(answer: tuple[int, Any]) -> tuple[int, str]:
    """Return the status of a refusal, and its code."""
    return answer[0], answer[1]["error"]["code"]


async def test_its_answers_fail_and_others_stay_what_they_were(world: tuple[World, MemoryStore]) -> None:
    """Answers, streams and vectors; the third time for good, in the metrics, and where models are listed."""
    async with open_replica(world) as api:
        requests = [("base", "completions"), ("all", "completions"), ("base", "embeddings")]
        before = [await ask(api, *each) for each in requests]
        assert [status for status, _ in before] == [200] * 3
        status, streamed = await ask(api, BAD, stream=True)
        assert "numerics" in streamed, (status, streamed)
        assert reason(await ask(api, BAD, "embeddings")) == (500, "numerics")
        assert (await api.http.get(f"/v1/models/{BAD}")).json()["last_failure"] is None
        assert reason(await ask(api, BAD)) == (500, "numerics")
        assert reason(await ask(api, BAD)) == (500, "model_unusable")
        body = (await api.http.get(f"/v1/models/{BAD}")).json()["last_failure"]
        assert body["reason"] == "MODEL_UNUSABLE"
        assert "within 60 s held NaN or infinity" in body["message"]
        for model, path in requests * 2:
            after = await ask(api, model, path)
            expected = before[requests.index((model, path))]
            assert _reported(after) == _reported(expected)
        metrics = (await api.http.get("/metrics")).text
        assert f'loramux_requests_total{{model="{BAD}",outcome="NUMERICS"}} 3' in metrics
        assert f'loramux_requests_total{{model="{BAD}",outcome="MODEL_UNUSABLE"}} 1' in metrics


def _reported(answer: tuple[int, Any]) -> Any:
    return answer[1].get("choices") or answer[1]["data"]
