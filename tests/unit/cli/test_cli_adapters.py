"""Commands ``loramux models``, ``pin``, ``unpin`` and ``rollout`` against APIs of scripted replicas."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inference_service.adapters.follower import FollowerStanding
from inference_service.rpc.adapters import SERVICE_NAME, AdapterServicer, register
from loramux.addresses import Address, resolve
from loramux.cli import shell
from loramux.cli.adapters import Rollout
from loramux.cli.main import app
from loramux.connection import API_KEY
from loramux.inference.v1 import inference_pb2_grpc
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.faults import SettingsInvalid
from loramux_shared.rpc.server import RpcServer
from tests.support.access import Certificates, keyring
from tests.support.fake_services import FakeInference
from tests.support.operated import Operated, operated
from tests.support.waiting import BOUND_S, Clock

KEYS, RING = keyring("infer", "admin")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that a command was given stays in the environment of its process."""
    monkeypatch.setenv(API_KEY, "")


def run(*args: str) -> tuple[int, str, str]:
    """Run a command in this process."""
    result = CliRunner().invoke(app, args)
    return result.exit_code, result.stdout, result.stderr


@contextmanager
def api(replica: Operated, guard: Guard = NOBODY_GUARDS) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the address of a replica's gRPC API, which runs in a thread, and a call in its loop."""
    add: Any = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    services = {
        SERVICE_NAME: partial(register, AdapterServicer(replica.manager)),
        "loramux.inference.v1.InferenceService": lambda server: add(FakeInference(), server),
    }
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def open_it() -> RpcServer:
        server = RpcServer("127.0.0.1:0", services, guard)
        await server.start()
        return server

    def do(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(BOUND_S)

    server = do(open_it())
    try:
        yield server.address, do
    finally:
        do(server.drain(0.1))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(BOUND_S)
        assert not thread.is_alive()
        loop.close()


def test_a_pin_is_told() -> None:
    """A pin is printed as a line and as a document; a name that is not served fails."""
    with api(operated()) as (address, _):
        assert run("pin", "one", "--grpc", address) == (0, "one: pinned, 000000000000, resident\n", "")
        code, text, _ = run("unpin", "one", "--grpc", address, "--json")
        assert (code, json.loads(text)["adapter"]["pinned"]) == (0, False)
        assert run("pin", "nobody", "--grpc", address)[0] == 1


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


@pytest.fixture
def when_told(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], None]:
    """Has something done when a command tells a text for the first time."""

    def when(text: str, do: Callable[[], object]) -> None:
        say, left = shell.say, [do]

        def stated(line: str, *style: str) -> None:
            say(line, *style)
            if text in line and left:
                left.pop()()

        monkeypatch.setattr(shell, "say", stated)

    return when


def test_a_rollout_ends_when_all_serve_the_generation(when_told: Callable[..., None]) -> None:
    """A line for every change of every replica, and one at the end."""
    first, second = operated(), operated()
    with api(first) as (one, do), api(second) as (two, also):
        do(first.manager.load("x", "org/x"))
        when_told(f"{two} serves 1", lambda: also(second.manager.load("x", "org/x")))
        code, text, stated = run("rollout", "demo", "--replicas", f"{one},{two}", "--timeout", f"{BOUND_S}")
    assert (code, text) == (0, "generation 2 is served by 2 replicas\n")
    assert [line.split(" ", 1)[1] for line in stated.splitlines() if two in line] == [
        f"{two} serves 1, current",
        f"{two} serves 2, current",
    ]


def test_a_rollout_by_a_name_with_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate for the name is enough, whatever the addresses behind it."""
    certificates = Certificates(tmp_path)
    certificates.issue("server", certificates.ours, "localhost")
    monkeypatch.setenv("LORAMUX_TLS_CA", str(tmp_path / "ours.pem"))
    with api(operated(), Guard(tls=certificates.server)) as (address, _):
        [found] = [each for each in resolve(f"grpcs://dns:///localhost:{address[10:]}") if "127" in each.target]
        assert asyncio.run(Rollout("demo", [found], None, as_json=False).run(BOUND_S))


def test_a_rollout_that_takes_too_long(when_told: Callable[..., None]) -> None:
    """A late replica is exit 3 with its name; a replica that can never serve the generation is exit 1."""
    replica = operated()
    with api(replica) as (address, _):
        when_told(f"{address} serves 1", lambda: Clock().advance(3600))
        query = ("rollout", "demo", "--replicas", address, "--timeout", "3600")
        code, _, stated = run(*query, "--generation", "2")
        assert (code, stated.count(f"{address} serves 1")) == (3, 2)
        code, text, _ = run(
            "rollout", "demo", "--replicas", f"{address},127.0.0.1:1", "--timeout", "0.5", "--json"
        )
        last = json.loads(text.splitlines()[-1])
        assert (code, last["done"], len(last["replicas"])) == (3, False, 2)
        replica.deployment.standing = FollowerStanding(1, 2, stale="another base")
        when_told("another base", lambda: Clock().advance(3600))
        code, _, stated = run(*query)
        assert (code, "another base" in stated) == (1, True)


def test_a_rollout_of_something_else() -> None:
    """A replica of another deployment and a key without rights are errors at once."""
    with api(operated()) as (address, _):
        code, _, stated = run("rollout", "other", "--replicas", address)
        assert (code, "found one of 'demo'" in stated) == (2, True)
    with api(operated(), Guard(RING)) as (address, _):
        assert run("--api-key", KEYS["infer"], "rollout", "demo", "--replicas", address)[0] == 4


def test_replicas_are_a_list_or_a_name() -> None:
    """Each once; a name stands for all of its addresses."""
    assert resolve("a:1, b:2,a:1") == (Address("a:1"), Address("b:2"))
    assert Address("127.0.0.1:50052") in resolve("dns:///localhost:50052")
    for wrong in ("", ",", "a", "a:b", "dns:///", "dns:///localhost", "dns:///no.such.host.invalid:1"):
        with pytest.raises(SettingsInvalid):
            resolve(wrong)
