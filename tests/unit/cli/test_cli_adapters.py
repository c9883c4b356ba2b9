"""The command ``loramux models`` against APIs of scripted replicas."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from inference_service.rpc.adapters import SERVICE_NAME, AdapterServicer
from loramux.connection import API_KEY
from loramux.inference.v1 import inference_pb2_grpc
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.rpc.server import RpcServer
from tests.support.access import keyring
from tests.support.commands import run
from tests.support.fake_services import FakeInference
from tests.support.operated import Operated, operated
from tests.support.waiting import loop_in_thread

KEYS, RING = keyring("infer", "admin")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that a command was given stays in the environment of its process."""
    monkeypatch.setenv(API_KEY, "")


@contextmanager
def api(replica: Operated, guard: Guard = NOBODY_GUARDS) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the address of a replica's gRPC API, which runs in a thread, and a call in its loop."""
    add: Any = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    services = {
        SERVICE_NAME: AdapterServicer(replica.manager).register,
        "loramux.inference.v1.InferenceService": lambda server: add(FakeInference(), server),
    }

    async def start() -> RpcServer:
        server = RpcServer("127.0.0.1:0", services, guard)
        await server.start()
        return server

    with loop_in_thread() as do:
        server = do(start())
        try:
            yield server.address, do
        finally:
            do(server.drain(0.1))


def test_models_say_where_they_are() -> None:
    """The places are for keys that may see them; another key gets the list alone."""
    replica = operated(["lora1", "lora2"])
    replica.residency.hold(replica.adapter("lora1"))
    replica.manager.pin("lora1")
    with api(replica, Guard(RING)) as (address, _):
        code, text, _ = run("--api-key", KEYS["admin"], "models", "--grpc", address)
        head, _, first, second = text.splitlines()
        assert code == 0
        assert head.split()[-4:] == ["tier", "pinned", "in", "use"]
        assert (first.split()[-3:], second.split()[-3:]) == (["device", "yes", "0"], ["store", "-", "0"])
        code, text, _ = run("--api-key", KEYS["infer"], "models", "--grpc", address)
        assert (code, "tier" in text) == (0, False)
        code, text, _ = run("--api-key", KEYS["admin"], "models", "--grpc", address, "--json")
        assert [each["name"] for each in json.loads(text)["adapters"]] == ["lora1", "lora2"]
