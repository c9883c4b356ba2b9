"""The gRPC API over a real loopback channel, from our client to a tiny model and back."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from inference_service.core.sequence import Batch
from inference_service.engine.execution.runner import Pending
from inference_service.startup.load import Ready
from loramux import AsyncClient, Delta, FinishReason, faults
from loramux.records import Finished, Started
from loramux_shared.storage.memory import MemoryStore
from tests.support.cases import cases
from tests.support.grpc_api import open_client, open_rpc
from tests.support.service import PROMPT, until_free
from tests.support.steps import Submit, engine_around
from tests.support.tiny import World
from tests.support.waiting import BOUND_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(chatty: tuple[World, MemoryStore]) -> AsyncIterator[tuple[Ready, AsyncClient]]:
    """A service whose engine runs, and a client of it."""
    ready = chatty[0].load(chatty[1], stream_interval_ms=0)
    ready.engine.start()
    async with open_client(ready) as client:
        yield ready, client
    await ready.engine.stop()


async def test_a_stream_is_started_deltas_finished(api: tuple[Ready, AsyncClient]) -> None:
    """A stream has one Started with the model, the tokens, and one Finished with the counts."""
    ready, client = api
    events = [event async for event in client.generate("rs", PROMPT, max_tokens=5, ignore_eos=True)]
    started, *deltas, finished = events
    assert isinstance(started, Started)
    assert (started.model, started.adapter_digest) == ("rs", ready.service.local.catalog.get("rs").digest)
    assert (started.generation, started.prompt_tokens) == (1, 4)
    assert sum(len(delta.token_ids) for delta in deltas if isinstance(delta, Delta)) == 5
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (4, 5)


async def test_a_deadline_frees_the_sequence(api: tuple[Ready, AsyncClient]) -> None:
    """A call whose deadline passes ends as DEADLINE_EXCEEDED, and its sequence is freed."""
    ready, client = api
    await ready.engine.pause()
    try:
        with pytest.raises(faults.DeadlineExceeded, match="deadline"):
            await client.complete("base", PROMPT, max_tokens=200, timeout_s=0.05)
    finally:
        ready.engine.resume()
    await until_free(ready)


async def test_logprobs_come_with_bytes(api: tuple[Ready, AsyncClient]) -> None:
    """The tokens of an answer and their alternatives come with their bytes."""
    ready, client = api
    completion = await client.complete("base", PROMPT, logprobs=3, max_tokens=6, temperature=1.0, seed=3)
    for token, item in zip(completion.token_ids, completion.logprobs, strict=True):
        assert item.token == ready.service.text.token_bytes(token)
        assert item.top_tokens == tuple(ready.service.text.token_bytes(token) for token, _ in item.top)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"json_schema": {"enum": ["a"]}}, '"a"'), ({"regex": "x{4}"}, "xxxx"), ({"lark": 'start: "ab"'}, "ab")],
)
async def test_constraints_reach_the_model(
    api: tuple[Ready, AsyncClient], options: dict[str, Any], text: str
) -> None:
    """Each kind of constraint shapes the answer."""
    assert (await api[1].complete("base", PROMPT, max_tokens=9, **options)).text == text


@pytest.mark.parametrize(("prompt", "options", "named"), cases(__file__, "REFUSED"))
async def test_what_is_refused_is_named(
    api: tuple[Ready, AsyncClient], prompt: Any, options: dict[str, Any], named: str
) -> None:
    """Arguments and parameters that are no JSON objects, and unusable constraints, are refused by name."""
    with pytest.raises(faults.RequestInvalid) as caught:
        await api[1].complete("base", prompt, **options)
    assert [finding.where for finding in caught.value.findings] == [named]


async def test_a_drain_that_takes_too_long_cuts_what_is_open(chatty: tuple[World, MemoryStore]) -> None:
    """A drain that exceeds its time ends open streams with SHUTTING_DOWN and a delay, and frees sequences."""
    ready = chatty[0].load(chatty[1], stream_interval_ms=0)
    ready.engine.start()
    async with open_rpc(ready.service) as server, AsyncClient(server.address) as client:
        events = client.generate("rs", PROMPT, max_tokens=240, ignore_eos=True)
        await anext(events)
        draining = asyncio.create_task(server.drain(0, ready.engine.cut))
        with pytest.raises(faults.ShuttingDown) as caught:
            assert [event async for event in events] == "nothing more"
        assert caught.value.retry_after_s is not None
        assert not await draining
    await until_free(ready)
    await ready.engine.stop()


async def test_tokens_between_first_and_last_come_together(
    chatty: tuple[World, MemoryStore],
) -> None:
    """The first token has a message of its own, and all tokens within an interval share one."""
    read = threading.Event()

    def second_waits(submit: Submit, batch: Batch) -> Pending:
        """Let the step behind the first token wait until the client has it."""
        first = batch.chunks[0]
        assert first.start == 0 or first.seq.id == "warm-up" or read.wait(BOUND_S)
        return submit(batch)

    ready = chatty[0].load(chatty[1], build=engine_around(second_waits), stream_interval_ms=3_600_000)
    ready.engine.start()
    counts = []
    async with open_client(ready) as client:
        async for event in client.generate("base", PROMPT, max_tokens=40, ignore_eos=True):
            if isinstance(event, Delta):
                counts.append(len(event.token_ids))
                read.set()
    await ready.engine.stop()
    assert counts == [1, 39]
