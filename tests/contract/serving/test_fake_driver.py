"""All APIs over the fake driver: what they give an engine, and what they make of what it says."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from inference_service.adapters.catalog import Catalog
from inference_service.api.http.app import create_app
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import ServingLimits
from inference_service.core.sequence import EndReason
from inference_service.core.served_model import ServedModel
from inference_service.driver.fake_driver import FakeDriver, Script
from inference_service.driver.port import Submission
from inference_service.engine.engine import SequenceCounts
from inference_service.text.text import Text
from loramux import AsyncClient, FinishReason, faults
from loramux_shared.faults import ReplicaFailed
from tests.golden.metrics.script import replica
from tests.support.grpc_api import open_rpc
from tests.support.tokens import VOCAB, write_tokenizer

STATE = np.array([3, 4], np.float32)
USER = {"role": "user", "content": "Hi"}


def script_of(submission: Submission) -> Script:
    """A vector for those that ask for one, a failure for seed 13, and else an answer in two steps."""
    if submission.pooling is not None:
        return Script(pooled=STATE)
    failure = ReplicaFailed("it ended.") if submission.sampling.seed == 13 else None
    return Script([["Ahoy", ", mate"]] * submission.n, EndReason.LENGTH, failure)


@pytest.fixture
def service(tmp_path: Path) -> GenerationService:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    text, limits = Text.load(tmp_path, VOCAB), ServingLimits(256, frozenset({2}), hidden_size=2)
    driver = FakeDriver(Catalog(7, "tiny", [ServedModel("tiny"), ServedModel("pirate")]), text, script_of)
    return GenerationService(driver, text, limits, replica(SequenceCounts({}, {})))


def submitted(service: GenerationService) -> list[Submission]:
    """Return what the engine was given."""
    assert isinstance(service.driver, FakeDriver)
    return service.driver.submitted


@pytest_asyncio.fixture
async def http(service: GenerationService) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(service, relay=lambda *_: None)  # what reads no prompt is the engine's to answer
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
        yield client


BODIES = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [USER], "max_tokens": 9},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_api_submits_the_prompt_and_tells_the_answer(
    service: GenerationService, http: httpx.AsyncClient, path: str, stream: bool
) -> None:
    """A submission has the model and the tokens of the prompt; the answer is what the engine said."""
    answer = await http.post(path, json={"model": "pirate", "stream": stream, **BODIES[path]})
    assert answer.status_code == 200
    parts = ('"Ahoy"', '", mate"') if stream else ("Ahoy, mate",)
    assert all(part in answer.text for part in parts)
    [submission] = submitted(service)
    assert submission.model.name == "pirate"
    assert list(submission.prompt) == service.text.encode("Hi", add_special_tokens=False)


async def test_a_vector_is_what_was_pooled(service: GenerationService, http: httpx.AsyncClient) -> None:
    """A vector comes back with the length 1, and no token was asked for."""
    answer = await http.post("/v1/embeddings", json={"model": "tiny", "input": "Hi"})
    assert answer.json()["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    [submission] = submitted(service)
    assert submission.sampling.max_tokens == 0


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"seed": 13}, 503, "replica_failed"),
        ({"max_tokens": 300}, 400, "context_length_exceeded"),
    ],
)
async def test_what_is_refused_or_fails_is_a_fault(
    service: GenerationService, http: httpx.AsyncClient, changed: dict[str, Any], status: int, code: str
) -> None:
    """An unknown model, an engine that fails, and an answer that does not fit."""
    body = {"model": "tiny", "prompt": "Hi", **changed}
    answer = await http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert service.in_work == 0


async def test_the_grpc_api_speaks_with_the_same_driver(service: GenerationService) -> None:
    """An answer, a failure and an unknown model."""
    async with open_rpc(service) as server, AsyncClient(server.address) as client:
        answer = await client.complete("pirate", "Hi", max_tokens=9)
        assert (answer.text, answer.reason) == ("Ahoy, mate", FinishReason.LENGTH)
        with pytest.raises(faults.ReplicaFailed, match="it ended"):
            await client.complete("pirate", "Hi", seed=13)
        with pytest.raises(faults.ModelNotFound, match="nobody"):
            await client.complete("nobody", "Hi")
