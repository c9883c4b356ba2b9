"""All APIs of both services, with keys: every rpc and every route, and the content that a key may see."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from builder_service.builds.builds import Builds
from builder_service.builds.keeper import BuildLimits
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME as BUILDER, BuilderServicer
from inference_service.adapters.fixed import fixed_manager
from inference_service.api.http.app import ENDPOINTS, create_app
from inference_service.api.http.wire.refusals import fault_body
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.adapters import SERVICE_NAME as ADAPTERS, AdapterServicer
from inference_service.api.rpc.servicer import SERVICE_NAME as INFERENCE, InferenceServicer
from loramux import AsyncClient
from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import adapters_pb2, inference_pb2
from loramux_shared.access.guard import Guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.faults import PermissionDenied, Unauthenticated
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.status import fault_of
from loramux_shared.settings import PREFIX
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.access import keyring, lines, new_entry
from tests.support.grpc_api import open_rpc
from tests.support.processes import forks
from tests.support.servers import ANY_PORT, serve
from tests.support.services.silent import silent_service
from tests.support.waiting import BOUND_S
from tests.support.web import web_client

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
REFUSALS = (Unauthenticated, PermissionDenied)
REFUSED = tuple(kind.reason for kind in REFUSALS)
KEYS, RING = keyring("infer", "build", "metrics", "admin")
RESTRICTED, ENTRY = new_entry("ann", "infer", models=("wide",))
OTHER, OTHER_ENTRY = new_entry("bob", "infer", models=("rs", "base"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> GenerationService:
    """A base and three adapters; no request of these tests gets to the engine."""
    return silent_service(tmp_path_factory.mktemp("text"))


def builder_servicer(folder: Path) -> BuilderServicer:
    context = BuildContext(MemoryStore(), open_sources(local_roots=[]), folder)
    return BuilderServicer(Builds(context, BuildLimits(running=1)), Checks(context))


@pytest.fixture(params=[BUILDER, INFERENCE, ADAPTERS])
async def guarded(
    request: pytest.FixtureRequest, tmp_path: Path, service: GenerationService
) -> AsyncIterator[Any]:
    """The service's name, and a channel to a real server with keys."""
    add = {
        BUILDER: builder_servicer(tmp_path).register,
        INFERENCE: InferenceServicer(service).register,
        ADAPTERS: AdapterServicer(fixed_manager(service.local.catalog)).register,
    }[request.param]
    async with (
        serve(RpcServer(ANY_PORT, {request.param: add}, Guard(RING))) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield request.param, channel


def bearer(key: str | None) -> list[tuple[str, str]]:
    return [] if key is None else [("authorization", f"Bearer {key}")]


async def methods_of(channel: grpc.aio.Channel, key: str) -> dict[str, list[str]]:
    """Every method of every service, as the server's reflection tells."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def ask(**fields: str) -> Any:
        question = reflection_pb2.ServerReflectionRequest(**fields)
        [answer] = [each async for each in stub.ServerReflectionInfo(iter([question]), metadata=bearer(key))]
        return answer

    found: dict[str, list[str]] = {}
    for service in (await ask(list_services="")).list_services_response.service:
        answer = await ask(file_containing_symbol=service.name)
        for blob in answer.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(blob)
            for each in file.service:
                if f"{file.package}.{each.name}" == service.name:
                    found[service.name] = [method.name for method in each.method]
    return found


async def outcome(channel: grpc.aio.Channel, path: str, key: str | None) -> str:
    """Call a method with an empty request; returns OK after a first message, else the status."""
    # One batch sends the request and takes the status. Where a stream of requests is refused before its first
    # message is sent, grpc.aio tells INTERNAL instead, once in a thousand calls.
    call = channel.unary_stream(path)(b"", metadata=bearer(key), timeout=BOUND_S)
    try:
        async for _ in call:
            break
    except grpc.aio.AioRpcError as error:
        fault = fault_of(error)
        return fault.reason if isinstance(fault, REFUSALS) else str(error.code().name)
    finally:
        call.cancel()
    return "OK"


async def test_every_rpc_asks_for_a_key_of_its_scope(guarded: Any) -> None:
    """No key or a wrong one is UNAUTHENTICATED, another scope PERMISSION_DENIED, and admin opens everything."""
    service, channel = guarded
    own = {BUILDER: "build", INFERENCE: "infer", ADAPTERS: "admin"}[service]
    foreign = "infer" if service == BUILDER else "build"
    methods = await methods_of(channel, KEYS[own])
    assert set(methods) == {service, HEALTH, REFLECTION}
    declared = {BUILDER: builder_pb2, INFERENCE: inference_pb2, ADAPTERS: adapters_pb2}[service]
    [descriptor] = declared.DESCRIPTOR.services_by_name.values()
    assert sorted(methods[service]) == sorted(method.name for method in descriptor.methods)
    for name, expected in (
        (service, ["UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED", "in", "in"]),
        (REFLECTION, ["UNAUTHENTICATED", "UNAUTHENTICATED", "in", "in", "in"]),
        (HEALTH, ["in"] * 5),
    ):
        for method in methods[name]:
            keys = (None, "lmx_wrong", KEYS[foreign], KEYS[own], KEYS["admin"])
            stated = [await outcome(channel, f"/{name}/{method}", key) for key in keys]
            assert [each if each in REFUSED else "in" for each in stated] == expected, (method, stated)


async def test_refused_uploads_have_the_status_of_their_key(tmp_path: Path) -> None:
    """A server that ends uploads while their clients write is heard by each of them."""
    files = {str(number): b"x" for number in range(100)}
    async with (
        serve(RpcServer(ANY_PORT, {BUILDER: builder_servicer(tmp_path).register}, Guard(RING))) as server,
        AsyncClient(builder=server.address, api_key=KEYS["infer"], timeout_s=BOUND_S) as client,
    ):
        pushes = [client.push("tiny", "two", files) for _ in range(400)]  # one in 50 lost it with grpc.aio
        refused = await asyncio.gather(*pushes, return_exceptions=True)
    assert {type(each) for each in refused} == {PermissionDenied}


async def test_what_does_not_exist_asks_for_a_key_too(guarded: Any) -> None:
    """Unknown methods are refused without a key, and a method of another service needs admin."""
    service, channel = guarded
    assert await outcome(channel, f"/{service}/Nope", None) == "UNAUTHENTICATED"
    assert await outcome(channel, "/no.such.Service/Nope", KEYS["infer"]) == "PERMISSION_DENIED"
    assert await outcome(channel, "/no.such.Service/Nope", KEYS["admin"]) == "UNIMPLEMENTED"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda each: f"{each.method} {each.path}")
async def test_every_route_asks_for_a_key(endpoint: Any, service: GenerationService) -> None:
    """Every route is served; all but health and the page require a key with the scope of the route."""
    path = endpoint.path.replace("{model:path}", "base").replace("{name:path}", "wide")
    figures, operators = (
        ("/metrics", "/load", "/loads", "/v1/loads"),
        ("/v1/adapters", "/v1/rollback", "/pause", "/resume", "/is_paused"),
    )
    own = "metrics" if path in figures else "admin" if path.startswith(operators) or "lora" in path else "infer"
    foreign = "metrics" if own == "infer" else "infer"
    async with web_client(create_app(service, RING)) as web:
        answers = [
            await web.request(endpoint.method, path, headers=bearer(key))
            for key in (None, "lmx_wrong", KEYS["build"], KEYS[foreign], KEYS[own], KEYS["admin"])
        ]
    statuses = [answer.status_code for answer in answers]
    if path in ("/", "/health", "/ping") or path.startswith("/page/"):
        assert statuses == [200] * 6
        return
    assert statuses[:4] == [401, 401, 403, 403]
    if not path.endswith("/pin"):  # nothing can be pinned here
        stored = path.startswith(("/v1/files", "/v1/batches"))  # there is no store for them
        read = endpoint.body and path != "/v1/files"  # a form is asked for its store first
        assert statuses[4:] == [415 if read else 404 if stored else 200] * 2
    expected = [answer.headers.get("www-authenticate") for answer in answers[:4]]
    assert expected == ["Bearer", "Bearer", None, None]
    for answer, kind in zip(answers[:4], (Unauthenticated,) * 2 + (PermissionDenied,) * 2, strict=True):
        parsed, body = answer.json(), {"path": path, "state": {"request_id": answer.headers["x-request-id"]}}
        assert parsed == fault_body(body, kind(parsed["error"]["message"]))


@pytest.fixture
async def address(service: GenerationService) -> AsyncIterator[str]:
    """A running inference service whose keys are limited to models."""
    ring = Keyring(text=lines(ENTRY, OTHER_ENTRY))
    async with open_rpc(service, Guard(ring)) as server:
        yield server.address


async def test_calls_at_the_same_time_keep_their_rights(address: str) -> None:
    """The rights of a call are its own, however many others run in between."""
    async with AsyncClient(address, api_key=RESTRICTED) as ann, AsyncClient(address, api_key=OTHER) as bob:
        answers = await asyncio.gather(*(client.models() for _ in range(50) for client in (ann, bob)))
    assert {tuple(model.name for model in answer) for answer in answers[::2]} == {("wide",)}
    assert {tuple(model.name for model in answer) for answer in answers[1::2]} == {("base", "rs")}


async def test_a_key_sees_its_models_only_over_http(service: GenerationService) -> None:
    """The HTTP API hides the same models."""
    app = create_app(service, Keyring(text=lines(ENTRY, OTHER_ENTRY)))
    async with web_client(app, headers=bearer(RESTRICTED)) as web:
        listed = (await web.get("/v1/models")).json()["data"]
        hidden = [await web.get(f"/v1/models/{name}") for name in ("rs", "publishers/ns/models/rs")]
        requests = await web.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 1})
    assert [model["id"] for model in listed] == ["wide"]
    for answer in (*hidden, requests):
        assert answer.status_code == 404
        named = answer.json()["error"]["message"].partition(".")[2]
        assert not any(f" {name}" in named for name in ("all", "base", "rs"))


def test_a_builder_is_not_opened_to_others_by_accident(tmp_path: Path) -> None:
    """The process ends with status 2 and one line before it listens beyond this machine without keys."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    flags, log = ["--grpc", "0.0.0.0:0", "--store", f"file://{tmp_path}"], tmp_path / "log"
    assert forks.builder_service(flags, log, environment).wait(BOUND_S) == 2
    [output] = log.read_text().splitlines()
    assert "SETTINGS_INVALID: 0.0.0.0:0 can be reached from other machines" in output
