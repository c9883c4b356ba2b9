"""The choice of a replica for a stream, and the addresses of a client."""

import pytest

from loramux.connection import Address, is_many, look_up, split
from loramux.fleet.placement import Placement
from loramux_shared.faults import SettingsInvalid

REPLICAS = tuple(f"10.0.0.{number}:50052" for number in range(1, 6))


def test_a_client_begins_where_it_drew() -> None:
    """The draw decides where among the replicas; those behind follow, and the first after the last."""
    placement, tried = Placement(REPLICAS, 0.7), list[str]()
    while (found := placement.take(tried)) is not None:
        tried.append(found)
    assert tried == [*REPLICAS[3:], *REPLICAS[:3]]


def test_replicas_that_failed_come_last() -> None:
    """A replica that failed comes last for a while; where all have failed, each may be tried again."""
    now = [0.0]
    placement = Placement(REPLICAS, 0.0, lambda: now[0])
    first, second, *others = REPLICAS
    placement.failed(first, 2.0)
    assert placement.take() == second
    now[0] = 2.0
    assert placement.take() == first
    for each in REPLICAS:
        placement.failed(each, 2.0)
    assert placement.take([first, second]) == others[0]
    assert placement.take(REPLICAS) is None


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
