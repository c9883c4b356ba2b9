"""A replica's requests to its builder, and gRPC services of extensions."""

from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from inference_service.rpc.extensions import Extensions, ServiceExtension, Services
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.access.guard import Guard
from loramux_shared.access.keys import Scope
from loramux_shared.faults import Fault
from loramux_shared.rpc.server import CORE, RpcServer, Rules
from tests.support.access import keyring


def info(state: DeploymentState, generation: int | None, failure: Fault | None = None) -> DeploymentInfo:
    return DeploymentInfo("demo", state, generation, None, None, (), failure, unchanged=False)


class Builder:
    """Builds, and has watchers ask for the build of their request."""

    def __init__(self, end: DeploymentInfo) -> None:
        self.end = end
        self.asked: list[Any] = []
        self.request_ids: list[str | None] = []

    async def update(self, name, add=None, remove=(), *, must_be_new=False, request_id=None) -> DeploymentInfo:
        self.asked.append((name, dict(add or {}), tuple(remove), must_be_new))
        self.request_ids.append(request_id)
        return info(DeploymentState.BUILDING, None)

    async def watch(self, name: str, *, request_id: str | None = None) -> AsyncIterator[DeploymentInfo]:
        assert name == "demo"
        assert request_id == self.request_ids[-1]
        yield info(DeploymentState.BUILDING, None)
        yield self.end

    async def rollback(self, name: str, to: int | None = None) -> Any:
        self.asked.append((name, to))
        return SimpleNamespace(generation=8)


async def _echo(request: Empty, _context: object) -> Empty:
    return request


class Echo:
    """An extension with a service of one method without a key and two with keys."""

    rules = Rules(
        {"others.Echo": Scope.INFER, "others.Echo/Loads": Scope.METRICS}, keyless=("/others.Echo/Health",)
    )

    def of_all_models(self, _healthy: object) -> Services:
        handler = grpc.unary_unary_rpc_method_handler(_echo, Empty.FromString, Empty.SerializeToString)
        handlers = dict.fromkeys(("Health", "Loads", "Ask"), handler)

        def register(server: Any) -> None:
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("others.Echo", handlers),))

        return {"others.Echo": register}

    def of_model(self, model: str, _healthy: object) -> Services:
        return self.of_all_models(_healthy) if model == "wide" else {}


EXTENSIONS = Extensions((cast(ServiceExtension, Echo()),))


def test_services_of_extensions_are_put_together() -> None:
    assert list(EXTENSIONS.of_all_models(lambda: True)) == ["others.Echo"]
    assert list(EXTENSIONS.of_model("wide", lambda: True)) == ["others.Echo"]
    assert not EXTENSIONS.of_model("base", lambda: True)
    assert not Extensions(()).of_all_models(lambda: True)
    assert Extensions(()).rules == CORE


@pytest.mark.parametrize(
    ("method", "opened_by"), [("Health", {"", "infer", "metrics"}), ("Loads", {"metrics"}), ("Ask", {"infer"})]
)
async def test_an_extension_says_which_keys_open_its_methods(method: str, opened_by: set[str]) -> None:
    keys, ring = keyring("infer", "metrics")
    services = EXTENSIONS.of_all_models(lambda: True)
    server = RpcServer("127.0.0.1:0", services, Guard(ring), rules=EXTENSIONS.rules)
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        for scope in ("", "infer", "metrics"):
            metadata = [("authorization", f"Bearer {keys[scope]}")] if scope else []
            call = channel.unary_unary(f"/others.Echo/{method}")(b"", metadata=metadata)
            with suppress(grpc.aio.AioRpcError):
                await call
            assert (await call.code() is grpc.StatusCode.OK) == (scope in opened_by)
    await server.drain(1)
