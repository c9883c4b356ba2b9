"""Every API of both services in this process, with one valid message for each rpc and route."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx
from google.protobuf.json_format import Parse
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from builder_service.builds.builds import Builds
from builder_service.builds.keeper import BuildLimits
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME as BUILDER, BuilderServicer
from inference_service.adapters.fixed import fixed_manager
from inference_service.api.http.app import ENDPOINTS
from inference_service.api.http.server import HttpServer
from inference_service.api.http.vectors.embeddings import PoolingBody
from inference_service.api.http.wire.body import Body
from inference_service.api.rpc.adapters import SERVICE_NAME as ADAPTERS, AdapterServicer
from inference_service.api.rpc.servicer import SERVICE_NAME as INFERENCE, InferenceServicer
from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import adapters_pb2, inference_pb2
from loramux_shared.deployment import SourceKind
from loramux_shared.faults import FAULTS
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.status import fault_of
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources
from loramux_shared.storage.memory import MemoryStore
from tests.fuzz.mutate import bounded, mutated_message
from tests.fuzz.numbers import NUMBERS, in_turn, on_the_wire, wire_fields
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.cases import cases
from tests.support.openai_api import TEMPLATE
from tests.support.tiny import make_world
from tests.support.waiting import BOUND_S

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
ENDLESS = f"/{ADAPTERS}/WatchReplica"
SHARED = {
    "chat/completions": "SAMPLED",
    "completions": "SAMPLED",
    "messages": "BLOCKS",
    "messages/count_tokens": "BLOCKS",
}
"""Tables with fields of several routes."""
KINDS = {each.path: each.body for each in ENDPOINTS if each.body and each.body.media_type == "application/json"}
BODIES: Mapping[str, tuple[type[Body], dict[str, Any]]] = {
    **{
        path: (KINDS[path], (cases(__file__, SHARED[path[4:]]) if path[4:] in SHARED else {}) | body)
        for path, body in cases(__file__, "BODIES").items()
        if path in KINDS
    },
    **{
        path: (kind, {"model": "base", "truncate_prompt_tokens": 8, **list(kind.examples.values())[-1]})
        for path, kind in KINDS.items()
        if issubclass(kind, PoolingBody)
    },
}
"""The kind of body and a valid one, of each route that takes a body."""
METHODS = {
    f"/{service.full_name}/{method.name}": method.input_type
    for module in (inference_pb2, adapters_pb2, builder_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def messages(folder: Path) -> dict[str, list[Message]]:
    """Return valid requests of every rpc; those of the builder name a folder's content."""
    made = {}
    for path, requests in cases(__file__, "MESSAGES").items():
        common = cases(__file__, "ASKED") if path == f"/{INFERENCE}/Generate" else {}
        texts = [json.dumps(common | each).replace("FOLDER", str(folder)) for each in requests]
        made[path] = [Parse(text, GetMessageClass(METHODS[path])()) for text in texts]
    return made


@dataclass(frozen=True)
class FuzzedApis:
    """Clients of running APIs."""

    web: httpx.AsyncClient
    channels: Mapping[str, grpc.aio.Channel]
    messages: Mapping[str, list[Message]]

    async def post(self, path: str, body: bytes) -> str:
        """Send a body; returns the status of the answer, or of an error its code, which is a name."""
        answer = await self.web.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code < 500, (answer.status_code, answer.text[:500])
        if answer.status_code == 200:
            return "OK"
        error = answer.json()["error"]
        code = error["type"] if path.startswith("/v1/messages") else error["code"]
        assert code, error
        assert error["message"], error
        return str(code)

    async def call(self, path: str, request: bytes) -> str:
        """Send the bytes of a request; returns OK or the reason of its fault."""
        return await outcome(self.channels[path.split("/")[1]], path, request)


async def outcome(channel: grpc.aio.Channel, path: str, request: bytes) -> str:
    """Send the bytes of a request over a channel; returns OK or the reason of its fault."""
    call = channel.unary_stream(path)(request, timeout=BOUND_S)
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            if path == ENDLESS:
                call.cancel()
                return "OK"
    if await call.code() is grpc.StatusCode.OK:
        return "OK"
    trailers = [await call.initial_metadata(), await call.trailing_metadata()]
    fault = fault_of(grpc.aio.AioRpcError(await call.code(), *trailers, await call.details()))
    assert fault.reason in FAULTS.keys() - {"INTERNAL"}, fault
    return fault.reason


Call = Callable[[str, bytes], Awaitable[str]]
"""Sends the bytes of a request to a method; returns OK or the reason of its fault."""


async def mutate(messages: Mapping[str, Sequence[Message]], call: Call, cases: range) -> None:
    """Send mutated messages, each from a seed: none makes the server fail, and some still are requests."""
    with bounded() as watch:
        for number in cases:
            rng = Random(number)
            method = rng.choice(sorted(messages))
            data = mutated_message(rng.choice(messages[method]), rng)
            with watch.case(f"{method} {number}"):
                watch.note(await call(method, data))
    assert watch.outcomes["OK"] > len(cases) / 100


async def number_each(method: str, requests: Sequence[Message], call: Call) -> None:
    """Send requests with numbers at their limits in each field, in bytes that no client library writes."""
    with bounded() as watch:
        for turn, path in enumerate(wire_fields(requests[0].DESCRIPTOR)):
            name = ".".join(field.name for field in path)
            for request in requests:
                for number in in_turn(NUMBERS, turn, 14):
                    more = on_the_wire(path, number)
                    if more is not None:
                        with watch.case(f"{method} {name} {number!r:.40}"):
                            watch.note(await call(method, request.SerializeToString() + more))


VALID: Mapping[str, str] = cases(__file__, "VALID")
"""Reasons of valid requests that cannot succeed here, for want of a builder, files or longer sequences."""


@asynccontextmanager
async def open_apis(folder: Path) -> AsyncIterator[FuzzedApis]:
    """Serve a tiny model and a builder; answers are short, and few requests wait."""
    world = replace(make_world(folder / "world"), max_seq_len=96)
    (world.base / "chat_template.jinja").write_text(TEMPLATE)
    ready = world.load(world.built(), max_queue=8, stream_interval_ms=0)
    write_base(folder / "base")
    write_adapter(folder / "one", tensors())
    context = BuildContext(MemoryStore(), Sources({SourceKind.LOCAL: LocalSource([folder])}), folder / "work")
    builds, checks = Builds(context, BuildLimits(running=1)), Checks(context)
    http = HttpServer("127.0.0.1:0", ready.service)
    operators = AdapterServicer(fixed_manager(ready.service.local.catalog))
    servers = {
        INFERENCE: RpcServer("127.0.0.1:0", {INFERENCE: InferenceServicer(ready.service).register}),
        ADAPTERS: RpcServer("127.0.0.1:0", {ADAPTERS: operators.register}),
        BUILDER: RpcServer("127.0.0.1:0", {BUILDER: BuilderServicer(builds, checks).register}),
    }
    ready.engine.start()
    url = f"http://{await http.start()}"
    channels = {name: grpc.aio.insecure_channel(await server.start()) for name, server in servers.items()}
    async with httpx.AsyncClient(base_url=url, timeout=BOUND_S) as web:
        apis = FuzzedApis(web, channels, messages(folder))
        for path, (_, body) in BODIES.items():
            assert await apis.post(path, json.dumps(body).encode()) == VALID.get(path, "OK"), path
        for path, requests in apis.messages.items():
            for request in requests:
                found = await apis.call(path, request.SerializeToString())
                assert found == VALID.get(path, "OK"), (path, found)
        yield apis
    await asyncio.gather(*(channel.close() for channel in channels.values()))
    checks.stop()
    await builds.drain(BOUND_S)
    await http.drain(BOUND_S)
    await asyncio.gather(*(server.drain(BOUND_S) for server in servers.values()))
    await ready.engine.stop()
