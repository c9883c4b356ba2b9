"""Keys of vLLM's services: the calls that each allows, and the requests that each may end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import cast

import grpc
import pytest

from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.service import GenerationService, ServingLimits
from inference_service.text.text import Text
from loramux_shared.access.guard import Guard
from loramux_shared.access.keys import ACCESS, Access, Scope
from loramux_shared.rpc.server import CORE, RpcServer
from loramux_vllm_grpc import engine, inference
from loramux_vllm_grpc.running import Running
from loramux_vllm_grpc.services import VllmServices
from tests.support.access import keyring
from tests.support.operated import Operated, operated
from tests.support.silent import SilentEngine, silent_service
from tests.support.tiny import VOCAB


@pytest.fixture
def replica() -> Operated:
    """Two adapters and a builder."""
    return operated()


@pytest.fixture
def engine_of_all(tmp_path: Path) -> SilentEngine:
    """The engine of the service, without computation."""
    return cast(SilentEngine, silent_service(tmp_path).engine)


@pytest.fixture
def services(replica: Operated, engine_of_all: SilentEngine, tmp_path: Path) -> VllmServices:
    """vLLM's services of a replica with keys."""
    text, limits = Text.load(tmp_path, VOCAB), ServingLimits(64, frozenset({2}))
    service = GenerationService(replica.names, text, cast(EngineThread, engine_of_all), limits)
    return VllmServices(service, replica.manager)


OPEN = {"HealthCheck"}
METRICS = {"GetLoads"}
INFER = {
    "Generate", "GenerateStream", "Embed", "Abort", "GetModelInfo", "GetServerInfo", "GetTokenizer",
    "SubscribeKvEvents",
}  # fmt: skip


async def test_keys_open_what_they_are_for(services: VllmServices) -> None:
    """Health needs none, loads want metrics, answers want infer, and everything else wants admin."""
    keys, ring = keyring("infer", "metrics", "admin")
    server = RpcServer(
        "127.0.0.1:0", services.of_all_models(lambda: True), Guard(ring), rules=CORE + services.rules
    )
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        for api in (engine, inference):
            for method in api.pb.DESCRIPTOR.services_by_name[api.SERVICE_NAME.rpartition(".")[2]].methods:
                needed = (
                    "" if method.name in OPEN else "metrics" if method.name in METRICS
                    else "infer" if method.name in INFER else "admin"
                )  # fmt: skip
                for scope in ("", "infer", "metrics"):
                    metadata = [("authorization", f"Bearer {keys[scope]}")] if scope else []
                    call = channel.unary_stream(f"/{api.SERVICE_NAME}/{method.name}")(b"", metadata=metadata)
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
