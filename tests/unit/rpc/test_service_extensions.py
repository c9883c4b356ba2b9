"""gRPC services of extensions, and the keys that open them."""

from contextlib import suppress
from typing import Any, cast

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from inference_service.rpc.extensions import Extensions, ServiceExtension, Services
from loramux_shared.access.guard import Guard
from loramux_shared.access.keys import Scope
from loramux_shared.rpc.server import CORE, RpcServer, Rules
from tests.support.access import keyring


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
