"""vLLM's services of a tiny real model: the replica's own port, and one that stands for an adapter."""

import hashlib
import io
import zipfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from inference_service.adapters.fixed import fixed_manager
from inference_service.startup.load import Ready
from loramux_shared.rpc.server import RpcServer
from loramux_shared.storage.memory import MemoryStore
from loramux_vllm_grpc.services import VllmServices
from loramux_vllm_grpc.wire import (
    common_pb2,
    engine_pb2 as engine_pb,
    engine_pb2_grpc,
    inference_pb2 as inference_pb,
    inference_pb2_grpc,
)
from tests.support.service import until_free
from tests.support.tiny import World
from tests.support.waiting import BOUND_S

PROMPT = [5, 6, 7, 8]
MODEL = "rs"
"""Model of the second port."""


@dataclass
class VllmApis:
    """Stubs of them."""

    ready: Ready
    server: RpcServer
    addresses: tuple[str, str]
    engine: engine_pb2_grpc.VllmEngineStub
    of_model: engine_pb2_grpc.VllmEngineStub
    inference: inference_pb2_grpc.InferenceStub

    async def until_free(self) -> None:
        """Wait until the engine holds no sequence."""
        await until_free(self.ready)

    async def engine_says(
        self, stub: Any = None, metadata: Sequence[tuple[str, str]] = (), **fields: Any
    ) -> list[engine_pb.GenerateResponse]:
        """All messages of a request to VllmEngine: greedy, of six tokens, by default."""
        params = engine_pb.SamplingParams(**({"temperature": 0.0, "max_tokens": 6} | fields.pop("params", {})))
        usual = {"tokenized": engine_pb.TokenizedInput(input_ids=PROMPT), "sampling_params": params}
        call = (stub or self.engine).Generate(engine_pb.GenerateRequest(**(usual | fields)), metadata=metadata)
        return [message async for message in call]

    async def inference_says(self, **fields: Any) -> list[inference_pb.GenerateResponse]:
        """All messages of a request to Inference.GenerateStream: of six tokens, with their ids."""
        call = self.inference.GenerateStream(inference_request(**fields))
        return [message async for message in call]


def inference_request(**fields: Any) -> inference_pb.GenerateRequest:
    """A request of six tokens, with their ids, by default."""
    usual = {
        "token_ids": inference_pb.TokenIds(ids=PROMPT),
        "stopping": inference_pb.StoppingCriteria(max_new_tokens=6),
        "response": inference_pb.ResponseOptions(output_token_ids=True),
    }
    return inference_pb.GenerateRequest(**(usual | fields))


@asynccontextmanager
async def open_apis(world: tuple[World, MemoryStore], **settings: Any) -> AsyncIterator[VllmApis]:
    """Serve a world on both ports."""
    ready = world[0].load(world[1], **({"stream_interval_ms": 0} | settings))
    vllm = VllmServices(ready.service, fixed_manager(ready.service.catalog))
    server = RpcServer("127.0.0.1:0", vllm.of_all_models(lambda: server.serving))
    of_model = RpcServer("127.0.0.1:0", vllm.of_model(MODEL, lambda: server.serving))
    channels = [grpc.aio.insecure_channel(await each.start()) for each in (server, of_model)]
    ready.engine.start()
    for each in (server, of_model):
        await each.set_serving(True)
    own, single = channels
    try:
        yield VllmApis(
            ready,
            server,
            (server.address, of_model.address),
            engine_pb2_grpc.VllmEngineStub(own),
            engine_pb2_grpc.VllmEngineStub(single),
            inference_pb2_grpc.InferenceStub(own),
        )
    finally:
        for channel in channels:
            await channel.close()
        for each in (server, of_model):
            await each.drain(BOUND_S)
        await ready.engine.stop()


async def failure(call: Any) -> tuple[str, str, list[str]]:
    """The status, the reason and the named fields with which a call, or a coroutine, ends."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    status = rpc_status.from_call(caught.value)
    for detail in status.details if status else ():
        detail.Unpack(info)
        detail.Unpack(bad)
    named = sorted({violation.field for violation in bad.field_violations})
    return caught.value.code().name, info.reason, named


async def archive_of(stub: Any) -> dict[str, bytes]:
    """The files that GetTokenizer streams, once their digest is looked at."""
    chunks = [chunk async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
