"""The requests of the HTTP API over gRPC: both accept the same, and refuse the same, each in its own words."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from inference_service.api.rpc.servicer import SERVICE_NAME
from loramux.inference.v1 import inference_pb2 as pb
from loramux.requests import generate_request
from tests.fuzz.apis import FuzzedApis
from tests.support.cases import cases
from tests.support.grpc_api import open_rpc
from tests.support.openai_api import open_api, openai_world

pytestmark = pytest.mark.asyncio(loop_scope="module")
TURNS = cases(__file__, "TURNS")
"""Messages, options of a chat, and whether they are taken."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def apis(api_processes: int, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FuzzedApis]:
    async with (
        open_api(openai_world(tmp_path_factory.mktemp("both"))) as http,
        open_rpc(http.ready.service) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield FuzzedApis(http.http, {SERVICE_NAME: channel}, {})


@pytest.mark.parametrize(("messages", "options", "taken"), TURNS)
async def test_turns_tools_and_variables(
    apis: FuzzedApis, messages: list[dict[str, Any]], options: dict[str, Any], taken: bool
) -> None:
    """Messages, tools and variables of the template are judged alike."""
    requests = {"messages": messages} | options
    body = {"model": "base", "max_tokens": 1} | requests
    reported = await apis.post("/v1/chat/completions", json.dumps(body).encode())
    request = pb.GenerateRequest(model="base", messages=pb.Messages())
    if messages:
        request = generate_request("base", messages, options | {"max_tokens": 1})
    stated = await apis.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString())
    assert (reported, stated) == (("OK", "OK") if taken else ("invalid_value", "REQUEST_INVALID"))


@pytest.mark.parametrize(("model", "adapters", "taken"), cases(__file__, "test_mixtures"))
async def test_mixtures(
    apis: FuzzedApis, model: str, adapters: list[tuple[str, float | None]], taken: bool
) -> None:
    """A blend by name over HTTP or by list over gRPC gives the same adapters, weights and counts."""
    body = {"model": model, "prompt": [5], "max_tokens": 1}
    reported = await apis.post("/v1/completions", json.dumps(body).encode())
    stated = []
    for request in (pb.GenerateRequest(model=model), pb.GenerateRequest()):
        request.token_ids.ids.append(5)
        request.sampling.max_tokens = 1
        if not request.model:
            request.adapters.extend(pb.ScaledAdapter(name=name, scale=scale) for name, scale in adapters)
        stated.append(await apis.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString()))
    assert (reported, *stated) == (("OK",) * 3 if taken else ("invalid_value",) + ("REQUEST_INVALID",) * 2)


async def test_adapters_beside_another_model_are_refused(apis: FuzzedApis) -> None:
    """Adapters of a request are of the base; one with weight 1 is that adapter."""
    for model, reported in (("rs", "REQUEST_INVALID"), ("base", "OK")):
        request = pb.GenerateRequest(model=model, text="a", adapters=[pb.ScaledAdapter(name="all")])
        request.sampling.max_tokens = 1
        assert await apis.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString()) == reported
