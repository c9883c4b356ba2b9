"""Every API of both services in this process, with one valid message for each rpc and route."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
from google.protobuf.message import Message

from builder_service.builds.builds import Builds
from builder_service.builds.journal import BuildLimits
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME as BUILDER, BuilderServicer
from inference_service.adapters.fixed import fixed_manager
from inference_service.http.admin.operators import LoadBody, RollbackBody, UnloadBody
from inference_service.http.anthropic.schema import CountBody, MessagesBody
from inference_service.http.app import ENDPOINTS
from inference_service.http.openai.chat_schema import ChatBody
from inference_service.http.openai.schema import CompletionBody
from inference_service.http.responses.schema import ResponsesBody
from inference_service.http.server import HttpServer
from inference_service.http.vectors.embeddings import PoolingBody
from inference_service.http.wire.body import Body
from inference_service.rpc.adapters import SERVICE_NAME as ADAPTERS, AdapterServicer
from inference_service.rpc.servicer import SERVICE_NAME as INFERENCE, InferenceServicer
from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import adapters_pb2, inference_pb2
from loramux_shared.deployment import SourceKind
from loramux_shared.faults import FAULTS
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.status import fault_of
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.cases import cases
from tests.support.openai_api import TEMPLATE
from tests.support.tiny import make_world
from tests.support.waiting import BOUND_S

TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "is it?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
]
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "What is it?"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "4"},
]
BLOCKS: dict[str, Any] = cases(__file__, "BLOCKS")
SAMPLED: dict[str, Any] = cases(__file__, "SAMPLED")
OF_EXTENSIONS: dict[str, Any] = {
    "/v1/responses/compact": {"model": "rs", "input": "Hi", "max_output_tokens": 2, "seed": 3},
    "/tokenize": {"model": "rs", "messages": TURNS, "tools": [TOOL]},
    "/detokenize": {"model": "rs", "tokens": [5, 6, 7]},
}
ENDLESS = f"/{ADAPTERS}/WatchReplica"
BODIES: Mapping[str, tuple[type[Body], dict[str, Any]]] = {
    "/v1/chat/completions": (
        ChatBody,
        {"model": "wide", "messages": TURNS, "tools": [TOOL], "tool_choice": "auto"}
        | {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
        | SAMPLED
        | {"logprobs": True, "top_logprobs": 2, "stream": False},
    ),
    "/v1/completions": (
        CompletionBody,
        {"model": "all", "prompt": ["Hello", [5, 6]], "echo": True, "logprobs": 2}
        | {"structured_outputs": {"regex": "[a-z]+"}, "cache_salt": "s", "request_id": "r"}
        | {"truncate_prompt_tokens": 50, "add_special_tokens": False}
        | SAMPLED,
    ),
    "/v1/responses/input_tokens": (ResponsesBody, {"model": "rs", "input": "Hi"}),
    "/v1/responses": (
        ResponsesBody,
        {
            "model": "rs",
            "instructions": "Be brief.",
            "input": ITEMS,
            "tools": [{"type": "function", "name": "f"}],
        }
        | {"tool_choice": "auto", "max_output_tokens": 2, "top_logprobs": 2, "metadata": {"a": "b"}, "seed": 3}
        | {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}},
    ),
    "/v1/messages": (
        MessagesBody,
        BLOCKS
        | {"max_tokens": 2, "stop_sequences": ["END"], "temperature": 1.0, "top_p": 0.9, "top_k": 5}
        | {"metadata": {"user_id": "u"}, "output_config": {"effort": "low"}},
    ),
    "/v1/messages/count_tokens": (CountBody, BLOCKS),
    "/v1/load_lora_adapter": (LoadBody, {"lora_name": "new", "lora_path": "org/new", "load_inplace": True}),
    "/v1/unload_lora_adapter": (UnloadBody, {"lora_name": "rs", "lora_int_id": 1}),
    "/v1/rollback": (RollbackBody, {"to": 1}),
    **{
        each.path: (
            each.body,
            {"model": "base", "truncate_prompt_tokens": 8, **list(each.body.examples.values())[-1]},
        )
        for each in ENDPOINTS
        if each.body is not None and issubclass(each.body, PoolingBody)
    },
    **{each.path: (each.body, OF_EXTENSIONS[each.path]) for each in ENDPOINTS if each.path in OF_EXTENSIONS},
}
"""The kind of body and a valid one, of each route that takes a body."""


def messages(folder: Path) -> dict[str, list[Message]]:
    """Return valid requests of every rpc; those of the builder name a folder's content."""
    sampling = inference_pb2.SamplingParams(
        **SAMPLED | {"logit_bias": {5: 1.5}, "logprobs": 2, "prompt_logprobs": 1}
    )
    call = inference_pb2.ToolCall(id="c1", name="look", arguments='{"at": 1}')
    turns = inference_pb2.Messages(
        messages=[
            inference_pb2.Message(role="user", content="What?"),
            inference_pb2.Message(role="assistant", tool_calls=[call]),
            inference_pb2.Message(role="tool", content="4", tool_call_id="c1"),
        ],
        tools=[inference_pb2.Tool(name="look", description="Look.", parameters='{"type": "object"}')],
    )
    schema = inference_pb2.Constraint(
        json_schema='{"type": "object", "properties": {"a": {"type": "integer"}}}'
    )
    ask = partial(
        inference_pb2.GenerateRequest,
        sampling=sampling,
        priority=1,
        cache_salt="s",
        truncate_prompt_tokens=50,
        add_special_tokens=True,
    )
    inputs = [
        inference_pb2.TextInput(text="Hello"),
        inference_pb2.TextInput(token_ids=inference_pb2.TokenIds(ids=[5, 6])),
    ]
    base, adapter = (
        builder_pb2.Repository(source="SOURCE_KIND_LOCAL", repo=str(folder / name)) for name in ("base", "one")
    )
    spec = builder_pb2.DeploymentSpec(
        model_name="tiny",
        base=base,
        adapters=[builder_pb2.Adapter(name="one", repository=adapter)],
        max_seq_len=64,
        max_lora_rank=8,
        truncate_to_rank=4,
        request_default_max_tokens=8,
        lora_dtype="DTYPE_FLOAT32",
    )
    return {
        f"/{INFERENCE}/Generate": [
            ask(model="base", text="Hello"),
            ask(model="wide", messages=turns),
            ask(model="all", token_ids=inference_pb2.TokenIds(ids=[5, 6]), constraint=schema),
        ],
        f"/{INFERENCE}/Embed": [
            inference_pb2.EmbedRequest(model="wide", inputs=inputs, dimensions=4, truncate_prompt_tokens=8)
        ],
        f"/{INFERENCE}/Classify": [inference_pb2.ClassifyRequest(model="wide", inputs=inputs)],
        f"/{INFERENCE}/ListModels": [inference_pb2.ListModelsRequest()],
        f"/{ADAPTERS}/ListAdapters": [adapters_pb2.ListAdaptersRequest(page_size=2)],
        f"/{ADAPTERS}/GetAdapter": [adapters_pb2.GetAdapterRequest(name="wide")],
        f"/{ADAPTERS}/PinAdapter": [adapters_pb2.PinAdapterRequest(name="wide")],
        f"/{ADAPTERS}/UnpinAdapter": [adapters_pb2.UnpinAdapterRequest(name="wide")],
        f"/{ADAPTERS}/LoadAdapter": [adapters_pb2.LoadAdapterRequest(name="new", path="org/new", replace=True)],
        f"/{ADAPTERS}/UnloadAdapter": [adapters_pb2.UnloadAdapterRequest(name="rs")],
        f"/{ADAPTERS}/RollbackReplica": [adapters_pb2.RollbackReplicaRequest(to=1)],
        f"/{ADAPTERS}/GetReplica": [adapters_pb2.GetReplicaRequest()],
        ENDLESS: [adapters_pb2.WatchReplicaRequest()],
        f"/{BUILDER}/BuildDeployment": [builder_pb2.BuildDeploymentRequest(deployment=spec)],
        f"/{BUILDER}/GetDeployment": [builder_pb2.GetDeploymentRequest(name="tiny")],
        f"/{BUILDER}/ListDeployments": [builder_pb2.ListDeploymentsRequest(page_size=2)],
        f"/{BUILDER}/WatchDeployment": [builder_pb2.WatchDeploymentRequest(name="tiny")],
        f"/{BUILDER}/UpdateDeployment": [
            builder_pb2.UpdateDeploymentRequest(
                name="tiny", add=[builder_pb2.Adapter(name="two", repository=adapter)], request_id="r"
            )
        ],
        f"/{BUILDER}/RollbackDeployment": [builder_pb2.RollbackDeploymentRequest(name="tiny", to=1)],
        f"/{BUILDER}/ListGenerations": [builder_pb2.ListGenerationsRequest(name="tiny", page_size=2)],
        f"/{BUILDER}/PutAdapter": [
            builder_pb2.PutAdapterRequest(
                upload=builder_pb2.AdapterUpload(
                    deployment="tiny", name="three", config=(folder / "one/adapter_config.json").read_bytes()
                )
            )
        ],
        f"/{BUILDER}/CancelBuild": [builder_pb2.CancelBuildRequest(name="tiny")],
        f"/{BUILDER}/CheckAdapter": [
            builder_pb2.CheckAdapterRequest(
                adapter=adapter, base=base, max_lora_rank=8, truncate_to_rank=4, lora_dtype="DTYPE_FLOAT32"
            )
        ],
    }


@dataclass(frozen=True)
class FuzzedApis:
    """Clients of running APIs."""

    web: httpx.AsyncClient
    channels: Mapping[str, grpc.aio.Channel]
    messages: Mapping[str, list[Message]]

    async def post(self, path: str, body: bytes) -> str:
        """Send a body; returns the status of the answer, or of an error its code, which is a name."""
        answer = await self.web.post(path, content=body, headers={"content-type": "application/json"})
        behind = answer.status_code == 503 and "replica_behind" in answer.text  # a generation that is not there
        assert answer.status_code < 500 or behind, (answer.status_code, answer.text[:500])
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


VALID: Mapping[str, str] = cases(__file__, "VALID")
"""Reasons of valid requests that cannot succeed here: the replica knows no builder and no classifier, the
question for a summary is longer than its sequences, and an upload has more than one message.
"""


@asynccontextmanager
async def open_apis(folder: Path) -> AsyncIterator[FuzzedApis]:
    """Serve a tiny model and a builder; answers are short, and few requests wait."""
    world = replace(make_world(folder / "world"), max_seq_len=96)
    (world.base / "chat_template.jinja").write_text(TEMPLATE)
    store = MemoryStore()
    world.build(store)
    ready = world.load(store, max_queue=8, stream_interval_ms=0)
    write_base(folder / "base")
    write_adapter(folder / "one", tensors())
    context = BuildContext(MemoryStore(), Sources({SourceKind.LOCAL: LocalSource([folder])}), folder / "work")
    builds, checks = Builds(context, BuildLimits(running=1)), Checks(context)
    http = HttpServer("127.0.0.1:0", ready.service)
    operators = AdapterServicer(fixed_manager(ready.service.catalog))
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
