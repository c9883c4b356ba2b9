"""Members of a fleet: names among their addresses are looked up again."""

from __future__ import annotations

import threading

import pytest

from loramux.connection import Address
from loramux_fleet.members import DOUBT_S, EVERY_S, Members
from loramux_shared.faults import ServerUnavailable, SettingsInvalid
from tests.support.waiting import BOUND_S


class Names:
    """A name server, and a clock."""

    def __init__(self) -> None:
        self.answers: list[str] | None = ["a:1", "b:1"]
        self.now = 100.0
        self.asked = threading.Semaphore(0)
        self.members = Members(["dns:///replicas:1"], self.look, lambda: self.now)

    def look(self, part: str) -> list[Address]:
        """Answer."""
        self.asked.release()
        if self.answers is None:
            raise SettingsInvalid(f"{part}: gone")
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


def test_a_name_is_looked_up_again() -> None:
    """Names are looked up again after their time, beside requests, which use the old addresses meanwhile."""
    names = Names()
    assert names.seen() == ["a:1", "b:1"]
    names.answers = ["b:1", "c:1"]
    names.now += EVERY_S - 0.1
    assert (names.seen(), names.count) == (["a:1", "b:1"], 1)
    names.now += 0.1
    assert [each.target for each in names.members.now()] == ["a:1", "b:1"]
    assert (names.seen(), names.count) == (["b:1", "c:1"], 1)


def test_a_failure_makes_it_look_sooner() -> None:
    """A failure brings the next lookup forward, but failures do not look names up at every request."""
    names = Names()
    names.seen()
    names.answers = ["c:1"]
    names.members.doubt()
    assert names.seen() == ["a:1", "b:1"]
    names.now += DOUBT_S
    names.members.now()
    assert names.seen() == ["c:1"]
    assert names.count == 2


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
    with pytest.raises(ServerUnavailable, match="gone"):
        fresh.members.now()
    fresh.answers = ["a:1"]
    assert fresh.seen() == ["a:1"]


def test_a_list_is_not_looked_up_again() -> None:
    """A list of addresses needs no lookup and no thread."""
    members = Members(["a:1", "b:1"])
    assert members.known
    assert members.now() is members.now()
