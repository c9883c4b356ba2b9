"""Every number of every request, at its limits and beyond: an answer or a named fault, soon, in few bytes."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import pytest
import pytest_asyncio

from inference_service.openai_api.app import ENDPOINTS
from inference_service.openai_api.operators import LoadBody
from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import adapters_pb2, inference_pb2
from loramux.vllm import control_pb2, engine_pb2
from loramux.vllm import inference_pb2 as vllm_pb2
from tests.fuzz.doors import BODIES, Doors, open_doors, vllm_messages
from tests.fuzz.mutate import bounded
from tests.fuzz.numbers import HOLE, LITERALS, NUMBERS, json_fields, on_the_wire, wire_fields
from tests.support.examples import SWEEPING

T = TypeVar("T")
pytestmark = pytest.mark.asyncio(loop_scope="module")
METHODS = {
    f"/{service.full_name}/{method.name}": method.input_type
    for module in (inference_pb2, adapters_pb2, builder_pb2, engine_pb2, vllm_pb2, control_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if module in (inference_pb2, adapters_pb2, builder_pb2)
    or f"/{service.full_name}/{method.name}" in vllm_messages()
}
"""Of vLLM's services those that read something and leave the replica as it is."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    """All doors."""
    async with open_doors(tmp_path_factory.mktemp("doors")) as opened:
        yield opened


def in_turn(numbers: Sequence[T], turn: int, share: int) -> Sequence[T]:
    """One in so many of the numbers, others for the next field; in a sweep all of them."""
    return numbers if os.environ.get(SWEEPING) else numbers[turn % share :: share]


async def test_nothing_is_left_out(doors: Doors) -> None:
    """Each route that takes a body and each rpc of both services has a valid request to start from."""
    read = {endpoint.path: endpoint.body for endpoint in ENDPOINTS if endpoint.body}
    assert {path: kind for path, (kind, _) in BODIES.items()} == read
    assert set(doors.messages) == set(METHODS)


@pytest.mark.parametrize("stream", [False, True])
async def test_numbers_in_json(doors: Doors, stream: bool) -> None:
    """Whatever number a client writes, it gets an answer or the name of what is wrong."""
    with bounded() as watch:
        kinds = {kind: (path, valid) for path, (kind, valid) in BODIES.items()}
        for kind, (path, valid) in kinds.items():
            if stream and "stream" not in kind.model_fields:
                continue
            fields = list(json_fields(kind))
            assert fields or kind is LoadBody  # which has none
            for turn, (place, name, value) in enumerate(fields):
                text = json.dumps(valid | {name: value} | ({"stream": True} if stream else {}))
                assert str(HOLE) in text
                for literal in in_turn(LITERALS, turn, 12 if stream else 6):
                    with watch.case(f"{path} {place} {literal:.40}"):
                        watch.note(await doors.post(path, text.replace(str(HOLE), literal).encode()))
    assert len(watch.outcomes) > 1


@pytest.mark.parametrize("method", METHODS)
async def test_numbers_on_the_wire(doors: Doors, method: str) -> None:
    """The same over gRPC, with bytes that a client's own library would not write."""
    with bounded() as watch:
        for turn, path in enumerate(wire_fields(METHODS[method])):
            name = ".".join(field.name for field in path)
            for request in doors.messages[method]:
                for number in in_turn(NUMBERS, turn, 6):
                    more = on_the_wire(path, number)
                    if more is not None:
                        with watch.case(f"{method} {name} {number!r:.40}"):
                            watch.note(await doors.call(method, request.SerializeToString() + more))
