"""A replica as Ray's proxies call it, without Ray: keys, the first part, statuses."""

from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2

from inference_service.api.http.app import create_app
from inference_service.api.rpc.servicer import InferenceServicer
from loramux.inference.v1 import inference_pb2 as pb
from loramux_ray.bridge import Bridge
from loramux_ray.calls import End, HttpCall, RpcCall
from loramux_ray.engine import answered
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.keys import KeyEntry, Scope, digest, new_key
from tests.contract.serving.conftest import service as service, shared as shared
from tests.support.service import PROMPT, Service
from tests.support.waiting import BOUND_S

pytestmark = pytest.mark.asyncio(loop_scope="module")
GENERATE = "/loramux.inference.v1.InferenceService/Generate"
KEY = new_key()


def bridge_of(service: Service, guard: Guard = NOBODY_GUARDS, *, insecure: bool = False) -> Bridge:
    servicer = InferenceServicer(service.ready.service)
    return Bridge([servicer.register], guard, None, insecure=insecure)


async def call(
    bridge: Bridge, method: str = GENERATE, key: str = "", peer: str = "127.0.0.1", **fields: Any
) -> list[list[bytes] | End]:
    tokens = pb.TokenIds(ids=PROMPT)
    request = pb.GenerateRequest(**({"model": "base", "token_ids": tokens} | fields))
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    requests = RpcCall(method, request.SerializeToString(), metadata, BOUND_S, peer)
    return [part async for part in bridge.run(requests)]


def reason_of(end: list[bytes] | End) -> str:
    assert isinstance(end, End)
    [details] = [value for name, value in end.trailing if name == "grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status_pb2.Status.FromString(details).details)
    return info.reason


async def test_a_refusal_is_the_one_of_our_api(service: Service) -> None:
    """A fault comes as its status with details, an unknown method as UNIMPLEMENTED."""
    bridge = bridge_of(service)
    assert reason_of((await call(bridge, model="nobody"))[0]) == "MODEL_NOT_FOUND"
    [unknown] = await call(bridge, "/loramux.inference.v1.InferenceService/Nothing")
    assert isinstance(unknown, End)
    assert unknown.code == 12
    [nonsense] = [part async for part in bridge.run(RpcCall(GENERATE, b"\xff", (), None, "127.0.0.1"))]
    assert reason_of(nonsense) == "REQUEST_INVALID"


async def test_keys_and_their_scopes_hold(service: Service) -> None:
    """A call needs a key with its scope where there are keys; with one it may come from anywhere."""
    sha = digest(KEY).hex()
    line = KeyEntry(id="one", sha256=sha, scopes=(Scope.INFER,), models=("wide",)).line()
    bridge = bridge_of(service, Guard(Keyring(None, line)))
    assert reason_of((await call(bridge))[0]) == "UNAUTHENTICATED"
    assert reason_of((await call(bridge, key=KEY))[0]) == "MODEL_NOT_FOUND"  # the base is not for it
    assert isinstance((await call(bridge, key=KEY, model="wide", peer="10.0.0.7"))[0], list)


async def test_without_keys_other_machines_are_refused(service: Service) -> None:
    """The APIs answer this machine alone where no key is required, unless the settings allow others."""
    assert reason_of((await call(bridge_of(service), peer="10.0.0.7"))[0]) == "PERMISSION_DENIED"
    assert isinstance((await call(bridge_of(service, insecure=True), peer="10.0.0.7"))[0], list)
    app = create_app(service.ready.service)
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "query_string": b""}
    statuses = []
    for local_only in (True, False):
        parts = answered(app, HttpCall(scope, b"", "10.0.0.7"), local_only=local_only)
        statuses += [part[0]["status"] async for part in parts]
    assert statuses == [403, 200]
