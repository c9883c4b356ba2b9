"""What operators do over vLLM's ``Control``, and which key may call what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.service import GenerationService, ServingLimits
from inference_service.text.text import Text
from inference_service.vllm_rpc import control, engine, inference
from inference_service.vllm_rpc.running import Running
from inference_service.vllm_rpc.services import VllmServices
from loramux.vllm import control_pb2 as pb
from loramux.vllm import control_pb2_grpc
from loramux_shared.access.guard import Guard
from loramux_shared.access.rights import ACCESS, Access, Scope
from loramux_shared.faults import AdapterInvalid
from loramux_shared.rpc.server import RpcServer
from tests.support.access import keyring
from tests.support.operated import Operated, operated
from tests.support.silent import SilentEngine, silent_service
from tests.support.tiny import VOCAB
from tests.support.vllm_doors import failure


@pytest.fixture
def replica() -> Operated:
    """Two adapters and a builder."""
    return operated()


@pytest.fixture
def engine_of_all(tmp_path: Path) -> SilentEngine:
    """Its engine, which computes nothing."""
    return cast(SilentEngine, silent_service(tmp_path)._engine)


@pytest.fixture
def services(replica: Operated, engine_of_all: SilentEngine, tmp_path: Path) -> VllmServices:
    """Its doors."""
    text, limits = Text.load(tmp_path, VOCAB), ServingLimits(64, None, frozenset({2}))
    service = GenerationService(replica.names, text, cast(EngineThread, engine_of_all), limits)
    return VllmServices(service, replica.manager)


@pytest.fixture
async def stub(services: VllmServices) -> AsyncIterator[control_pb2_grpc.ControlStub]:
    """A client of them."""
    server = RpcServer("127.0.0.1:0", services.of_all_models(lambda: True))
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        yield control_pb2_grpc.ControlStub(channel)
    await server.drain(1)


async def test_adapters_come_and_go(stub: Any, replica: Operated) -> None:
    """A load publishes a generation, an unload the next; each tells name, version and source."""
    listed = (await stub.ListLoras(pb.ListLorasRequest())).adapters
    assert [(each.lora_name, each.lora_id) for each in listed] == [("one", 0), ("two", 0)]
    request = pb.LoadLoraRequest(lora_name="three", source_path="org/three@v1")
    loaded = (await stub.LoadLora(request)).adapter
    assert loaded.lora_name == "three"
    assert replica.deployment.newest.number == 2
    [(name, repository, _)] = replica.deployment.asked
    assert (name, repository.repo, repository.revision) == ("three", "org/three", "v1")
    assert await failure(stub.LoadLora(request)) == ("ALREADY_EXISTS", "ADAPTER_EXISTS", [])
    assert (await stub.UnloadLora(pb.UnloadLoraRequest(lora_name="one"))).adapter.lora_name == "one"
    listed = (await stub.ListLoras(pb.ListLorasRequest())).adapters
    assert [each.lora_name for each in listed] == ["three", "two"]
    gone = stub.UnloadLora(pb.UnloadLoraRequest(lora_name="one"))
    assert await failure(gone) == ("NOT_FOUND", "MODEL_NOT_FOUND", [])
    replica.deployment.refuses = AdapterInvalid("it is pickled")
    refused = stub.LoadLora(pb.LoadLoraRequest(lora_name="four", source_path="org/four"))
    assert await failure(refused) == ("INVALID_ARGUMENT", "ADAPTER_INVALID", [])
    assert (await failure(stub.LoadLora(pb.LoadLoraRequest())))[2] == ["lora_name", "source_path"]
    assert (await failure(stub.UnloadLora(pb.UnloadLoraRequest())))[2] == ["lora_name"]


def test_a_version_has_a_number() -> None:
    """An int64 of the first digits of its digest."""
    assert control.lora_id("f" * 64) == 16**15 - 1 < 2**63
    assert control.lora_id("0123456789abcdef" * 4) == 0x0123456789ABCDE


@pytest.mark.parametrize(("mode", "expected"), [(0, "abort"), (1, "abort"), (2, "wait"), (3, "keep")])
async def test_pause_and_resume(stub: Any, engine_of_all: SilentEngine, mode: int, expected: str) -> None:
    """Each mode is the engine's; where none is said, it is vLLM's default."""
    await stub.PauseGeneration(pb.PauseGenerationRequest(mode=mode, clear_cache=True))
    assert engine_of_all.mode == expected
    assert (await stub.IsPaused(pb.IsPausedRequest())).paused
    await stub.ResumeGeneration(pb.ResumeGenerationRequest())
    assert not (await stub.IsPaused(pb.IsPausedRequest())).paused


async def test_another_mode_is_refused(stub: Any, engine_of_all: SilentEngine) -> None:
    """Nothing stands still then; and nothing sleeps."""
    assert (await failure(stub.PauseGeneration(pb.PauseGenerationRequest(mode=9))))[2] == ["mode"]
    assert not engine_of_all.paused
    assert not (await stub.IsSleeping(pb.IsSleepingRequest())).sleeping


OPEN = {"HealthCheck"}
METRICS = {"GetLoads"}
INFER = {
    "Generate", "GenerateStream", "Embed", "Abort", "GetModelInfo", "GetServerInfo", "GetTokenizer",
    "SubscribeKvEvents", "GetKvEventSources",
}  # fmt: skip


async def test_keys_open_what_they_are_for(services: VllmServices) -> None:
    """Health needs none, loads want metrics, answers want infer, and everything else wants admin."""
    keys, ring = keyring("infer", "metrics", "admin")
    server = RpcServer("127.0.0.1:0", services.of_all_models(lambda: True), Guard(ring))
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        for door in (engine, inference, control):
            for method in door.pb.DESCRIPTOR.services_by_name[door.SERVICE_NAME.rpartition(".")[2]].methods:
                needed = (
                    "" if method.name in OPEN else "metrics" if method.name in METRICS
                    else "infer" if method.name in INFER else "admin"
                )  # fmt: skip
                for scope in ("", "infer", "metrics"):
                    metadata = [("authorization", f"Bearer {keys[scope]}")] if scope else []
                    call = channel.unary_stream(f"/{door.SERVICE_NAME}/{method.name}")(b"", metadata=metadata)
                    with suppress(grpc.aio.AioRpcError):
                        await call.read()
                    denied = (await call.code()).name in ("UNAUTHENTICATED", "PERMISSION_DENIED")
                    assert denied == (needed not in ("", scope)), (method.full_name, scope)
    await server.drain(1)


def test_nobody_ends_the_requests_of_another_key() -> None:
    """Ids are those of a caller; several may have the same."""
    running = Running()
    with running.call("x") as mine, running.call("x") as again:
        token = ACCESS.set(Access("other", frozenset({Scope.INFER})))
        with running.call("x") as theirs:
            running.abort(["x", "y"])
            assert (mine.aborted, again.aborted, theirs.aborted) == (False, False, True)
        ACCESS.reset(token)
        running.abort(["x"])
        assert mine.aborted
        assert again.aborted
        assert len(running) == 2
    assert not len(running)
