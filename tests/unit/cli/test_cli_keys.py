"""The key that the command line shows, what services that it starts inherit, and models of guarded replicas."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux.cli.exits import Exit
from loramux.cli.local import services
from loramux.cli.local.tree import ProcessTree
from loramux_shared.access import API_KEY
from loramux_shared.access.guard import Guard
from tests.support.access import keyring
from tests.support.processes.commands import run
from tests.support.services.fake_grpc import Fakes, open_fakes
from tests.support.services.managed_replica import managed_replica, serve_adapters


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "")


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[Fakes, dict[str, str]]]:
    """Scripted services that ask for keys, and a key for each scope."""
    keys, ring = keyring("infer", "build")
    with open_fakes(Guard(ring)) as running:
        yield running, keys


def test_the_command_line_shows_a_key(guarded: tuple[Fakes, dict[str, str]], monkeypatch) -> None:
    """A key comes from --api-key before the command, else from LORAMUX_API_KEY; health needs none."""
    fakes, keys = guarded
    query = ("models", "--grpc", fakes.inference_address)
    code, _, errors = run(*query)
    assert code == Exit.DENIED
    assert errors.startswith("error: UNAUTHENTICATED: this server requires an API key")
    assert "LORAMUX_API_KEY" in errors
    assert run("health", fakes.inference_address)[0] == 0
    assert "PERMISSION_DENIED" in run("--api-key", keys["build"], *query)[2]
    assert run("--api-key", keys["infer"], *query)[0] == 0
    monkeypatch.setenv(API_KEY, keys["infer"])
    assert run(*query)[0] == 0
    monkeypatch.setenv(API_KEY, "")


def test_service_flags() -> None:
    """A service that the command line starts inherits the key file and the permission to be insecure."""
    assert services.access_flags(None, False) == []
    assert services.access_flags(Path("/a/../k"), True) == ["--keys-file", "/k", "--insecure"]


async def test_children_on_this_machine_have_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that `up` starts inherits keys but not TLS, whose certificate would not name the loopback."""
    monkeypatch.setenv("LORAMUX_TLS_CERT", "/server.pem")
    monkeypatch.setenv("LORAMUX_KEYS_FILE", "/keys.jsonl")
    text = (
        "import os; print(sorted(name for name in os.environ if name.startswith(('LORAMUX_T', 'LORAMUX_K'))))"
    )
    async with ProcessTree() as tree:
        await tree.run("child", [sys.executable, "-c", text])
        assert (tree.folder / "child.log").read_text() == "['LORAMUX_KEYS_FILE']\n"


KEYS, RING = keyring("infer", "admin")


def test_models_say_where_they_are() -> None:
    """The places are for keys that may see them; another key gets the list alone."""
    replica = managed_replica(["lora1", "lora2"])
    replica.residency.hold(replica.adapter("lora1"))
    replica.manager.pin("lora1")
    with serve_adapters(replica, Guard(RING)) as (address, _):
        code, text, _ = run("--api-key", KEYS["admin"], "models", "--grpc", address)
        head, _, first, second = text.splitlines()
        assert code == 0
        assert head.split()[-4:] == ["tier", "pinned", "in", "use"]
        assert (first.split()[-3:], second.split()[-3:]) == (["device", "yes", "0"], ["store", "-", "0"])
        code, text, _ = run("--api-key", KEYS["infer"], "models", "--grpc", address)
        assert (code, "tier" in text) == (0, False)
        code, text, _ = run("--api-key", KEYS["admin"], "models", "--grpc", address, "--json")
        assert [each["name"] for each in json.loads(text)["adapters"]] == ["lora1", "lora2"]
