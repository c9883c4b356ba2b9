"""The addresses of a client: lists, names of many, and how names are looked up again."""

from __future__ import annotations

import threading

import pytest

from loramux.addresses import DOUBT_S, EVERY_S, Address, Members, is_many, look_up, split
from loramux_shared.faults import ServerUnavailable, SettingsInvalid
from tests.support.waiting import BOUND_S


def test_lists_are_split() -> None:
    """Each address once, in their order, whatever their kinds."""
    assert split("a:1, b:2,a:1") == ("a:1", "b:2")
    kinds = ("grpcs://a:1", "[::1]:2", "dns:///replicas:3", "grpcs://dns:///replicas:4")
    assert split(",".join(kinds)) == kinds


def test_what_is_no_address_is_named() -> None:
    """A wrong address is refused with the expected form."""
    for wrong in (
        "", ",", "a", "a:b", "a:1,b", "http://a:1,b:1", "dns:///", "dns:///a", "dns://a:1", ":1", "a:99999",
    ):  # fmt: skip
        with pytest.raises(SettingsInvalid, match="expected HOST:PORT, a list of them, or dns:///NAME:PORT"):
            split(wrong)


def test_which_words_are_many() -> None:
    """A single address is one replica, with TLS too; a list and a DNS name are several."""
    assert not any(map(is_many, ("a:1", "grpcs://a:1", "[::1]:1", "unix:/run/loramux.sock")))
    assert all(map(is_many, ("a:1,b:1", "dns:///a:1", "grpcs://dns:///a:1")))


def test_names_are_looked_up() -> None:
    """All addresses behind one, each with the name that its certificate has to have."""
    assert Address("127.0.0.1:7") in look_up("dns:///localhost:7")
    assert Address("grpcs://127.0.0.1:7", "localhost") in look_up("grpcs://dns:///localhost:7")
    assert look_up("a:1") == (Address("a:1"),)
    with pytest.raises(SettingsInvalid, match="a name that resolves"):
        look_up("dns:///no.such.host.invalid:1")


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
