"""Requests to vLLM's services, mutated or with numbers at their limits: the server fails at none of them."""

from collections.abc import AsyncIterator
from functools import partial

import grpc
import pytest
import pytest_asyncio
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from loramux_shared.storage.memory import MemoryStore
from loramux_vllm_grpc.wire import engine_pb2, inference_pb2
from tests.fuzz.apis import mutate, number_each, outcome
from tests.support.cases import cases
from tests.support.tiny import World
from tests.vllm_apis import open_apis

pytestmark = pytest.mark.asyncio(loop_scope="module")


KINDS = {
    f"/{service.full_name}/{method.name}": method.input_type._concrete_class
    for module in (engine_pb2, inference_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
MESSAGES: dict[str, list[Message]] = {
    path: [ParseDict(fields, KINDS[path]()) for fields in requests]
    for path, requests in cases(__file__, "messages").items()
}
"""Messages of the methods that read something and leave the replica as it is."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(world: tuple[World, MemoryStore]) -> AsyncIterator[grpc.aio.Channel]:
    """A client of a tiny model; every valid request succeeds."""
    async with open_apis(world, max_queue=8) as apis, grpc.aio.insecure_channel(apis.addresses[0]) as opened:
        for path, requests in MESSAGES.items():
            for request in requests:
                assert await outcome(opened, path, request.SerializeToString()) == "OK", path
        yield opened


@pytest.mark.parametrize("cases", [range(100), pytest.param(range(100, 4000), marks=pytest.mark.sweep)])
async def test_mutated_messages(channel: grpc.aio.Channel, cases: range) -> None:
    """A mutated message is never INTERNAL, and every refusal has a reason."""
    await mutate(MESSAGES, partial(outcome, channel), cases)


@pytest.mark.parametrize("method", MESSAGES)
async def test_numbers_on_the_wire(channel: grpc.aio.Channel, method: str) -> None:
    """Any number that a client writes gets an answer or the name of the error."""
    await number_each(method, MESSAGES[method], partial(outcome, channel))
