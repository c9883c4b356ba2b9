"""Members of a fleet, the trip of a request from replica to replica, and ``loramux rollout``."""

import json
import threading
from collections.abc import Callable

import pytest

from inference_service.adapters.follower import FollowerStanding
from loramux.cli import shell
from loramux.connection import Address
from loramux.fleet.members import EVERY_S, Members
from loramux.fleet.placement import Placement
from loramux.fleet.trip import TRIES, Trip
from loramux_shared import faults
from loramux_shared.access.guard import Guard
from tests.contract.client.test_placement import REPLICAS
from tests.support.processes.commands import run
from tests.support.services.managed_replica import managed_replica, serve_adapters
from tests.support.waiting import BOUND_S, Clock
from tests.unit.cli.test_cli_keys import KEYS, RING, _no_key as _no_key


class Names:
    """A name server, and a clock."""

    def __init__(self) -> None:
        self.answers: list[str] | None = ["a:1", "b:1"]
        self.now = 100.0
        self.asked = threading.Semaphore(0)
        self.members = Members(["dns:///replicas:1"], self.look, lambda: self.now)

    def look(self, part: str) -> list[Address]:
        self.asked.release()
        if self.answers is None:
            raise faults.SettingsInvalid(f"{part}: gone")
        return [Address(each) for each in self.answers]

    def seen(self) -> list[str]:
        """Return the members, once every answer has arrived."""
        for thread in threading.enumerate():
            if thread.name == "loramux-names":
                thread.join(BOUND_S)
                assert not thread.is_alive()
        return [each.target for each in self.members.now()]

    @property
    def count(self) -> int:
        """Return the number of look-ups since the last time."""
        found = 0
        while self.asked.acquire(blocking=False):
            found += 1
        return found


def test_a_name_server_that_fails_takes_nobody_away() -> None:
    """A failed lookup keeps the known addresses; a first lookup that fails is an error."""
    names = Names()
    names.seen()
    names.answers = None
    names.now += EVERY_S
    names.members.now()
    assert names.seen() == ["a:1", "b:1"]
    fresh = Names()
    fresh.answers = None
    assert not fresh.members.known
    with pytest.raises(faults.ServerUnavailable, match="gone"):
        fresh.members.now()
    fresh.answers = ["a:1"]
    assert fresh.seen() == ["a:1"]


def test_a_list_is_not_looked_up_again() -> None:
    """A list of addresses needs no lookup and no thread."""
    members = Members(["a:1", "b:1"])
    assert members.known
    assert members.now() is members.now()


def trip(placement: Placement, repeat: bool = True) -> Trip:
    """A request without a deadline."""
    return Trip(placement, None, repeat=repeat)


@pytest.mark.parametrize(
    "fault", [faults.QueueFull("full"), faults.ShuttingDown("leaving"), faults.ReplicaBehind("behind")]
)
def test_few_are_asked_that_refuse(fault: faults.Fault) -> None:
    """A fleet that is full is not asked from end to end by every request."""
    way = trip(Placement(REPLICAS))
    for _ in range(TRIES - 1):
        way.begin()
        way.failed(fault)
    way.begin()
    with pytest.raises(type(fault)):
        way.failed(fault)
    assert len(REPLICAS) > TRIES


def test_what_another_cannot_help_is_raised() -> None:
    """An unknown model, a started answer and a request that must not run twice are not retried."""
    for fault, repeat, answered in (
        (faults.ModelNotFound("no model"), True, False),
        (faults.ServerUnavailable("cut"), True, True),
        (faults.ServerUnavailable("cut"), False, False),
    ):
        way = trip(Placement(REPLICAS), repeat)
        way.begin()
        with pytest.raises(type(fault)) as caught:
            way.failed(fault, answered=answered)
        assert caught.value is fault


def test_what_concerns_one_adapter_is_nothing_of_the_replica() -> None:
    """A replica that is behind keeps its other models; one that is full is left alone as long as it says."""
    placement = Placement(REPLICAS, 0.0)
    first, second, *_ = REPLICAS
    for fault, found in ((faults.ReplicaBehind("behind"), first), (faults.QueueFull("full"), second)):
        way = trip(placement)
        way.begin()
        way.failed(fault)
        assert trip(placement).begin() == found


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
    first, second = managed_replica(), managed_replica()
    with serve_adapters(first) as (one, do), serve_adapters(second) as (two, also):
        do(first.manager.load("x", "org/x"))
        when_printed(f"{two} serves 1", lambda: also(second.manager.load("x", "org/x")))
        code, text, stated = run("rollout", "demo", "--replicas", f"{one},{two}", "--timeout", f"{BOUND_S}")
    assert (code, text) == (0, "generation 2 is served by 2 replicas\n")
    assert [line.split(" ", 1)[1] for line in stated.splitlines() if two in line] == [
        f"{two} serves 1, current",
        f"{two} serves 2, current",
    ]


def test_a_rollout_that_takes_too_long(when_printed: Callable[..., None]) -> None:
    """A late replica is exit 3 with its name; a replica that can never serve the generation is exit 1."""
    replica = managed_replica()
    with serve_adapters(replica) as (address, _):
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
    with serve_adapters(managed_replica()) as (address, _):
        code, _, stated = run("rollout", "other", "--replicas", address)
        assert (code, "found one of 'demo'" in stated) == (2, True)
    with serve_adapters(managed_replica(), Guard(RING)) as (address, _):
        assert run("--api-key", KEYS["infer"], "rollout", "demo", "--replicas", address)[0] == 4
