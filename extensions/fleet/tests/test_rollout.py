"""Command ``loramux rollout`` against APIs of scripted replicas."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inference_service.adapters.follower import FollowerStanding
from loramux.cli import shell
from loramux.connection import resolve
from loramux_fleet.rollout import Rollout
from loramux_shared.access.guard import Guard
from tests.support.access import Certificates
from tests.support.commands import run
from tests.support.operated import operated
from tests.support.waiting import BOUND_S, Clock
from tests.unit.cli.test_cli_keys import KEYS, RING, _no_key as _no_key, api


@pytest.fixture
def when_printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], None]:
    """Has something done when a command prints a text for the first time."""

    def when(text: str, do: Callable[[], object]) -> None:
        say, left = shell.say, [do]

        def stated(line: str, *style: str) -> None:
            say(line, *style)
            if text in line and left:
                left.pop()()

        monkeypatch.setattr(shell, "say", stated)

    return when


def test_a_rollout_ends_when_all_serve_the_generation(when_printed: Callable[..., None]) -> None:
    """A line for every change of every replica, and one at the end."""
    first, second = operated(), operated()
    with api(first) as (one, do), api(second) as (two, also):
        do(first.manager.load("x", "org/x"))
        when_printed(f"{two} serves 1", lambda: also(second.manager.load("x", "org/x")))
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


def test_a_rollout_that_takes_too_long(when_printed: Callable[..., None]) -> None:
    """A late replica is exit 3 with its name; a replica that can never serve the generation is exit 1."""
    replica = operated()
    with api(replica) as (address, _):
        when_printed(f"{address} serves 1", lambda: Clock().advance(3600))
        query = ("rollout", "demo", "--replicas", address, "--timeout", "3600")
        code, _, stated = run(*query, "--generation", "2")
        assert (code, stated.count(f"{address} serves 1")) == (3, 2)
        code, text, _ = run(
            "rollout", "demo", "--replicas", f"{address},127.0.0.1:1", "--timeout", "0.5", "--json"
        )
        last = json.loads(text.splitlines()[-1])
        assert (code, last["done"], len(last["replicas"])) == (3, False, 2)
        replica.deployment.standing = FollowerStanding(1, 2, stale="another base")
        when_printed("another base", lambda: Clock().advance(3600))
        code, _, stated = run(*query)
        assert (code, "another base" in stated) == (1, True)


def test_a_rollout_of_something_else() -> None:
    """A replica of another deployment and a key without rights are errors at once."""
    with api(operated()) as (address, _):
        code, _, stated = run("rollout", "other", "--replicas", address)
        assert (code, "found one of 'demo'" in stated) == (2, True)
    with api(operated(), Guard(RING)) as (address, _):
        assert run("--api-key", KEYS["infer"], "rollout", "demo", "--replicas", address)[0] == 4
