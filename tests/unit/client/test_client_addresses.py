"""The addresses of a client: lists, and names of many."""

from __future__ import annotations

import pytest

from loramux.connection import Address, is_many, look_up, resolve, split
from loramux_shared.faults import SettingsInvalid


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


def test_replicas_are_a_list_or_a_name() -> None:
    """Each once; a name stands for all of its addresses."""
    assert resolve("a:1, b:2,a:1") == (Address("a:1"), Address("b:2"))
    assert Address("127.0.0.1:50052") in resolve("dns:///localhost:50052")
    for wrong in ("", ",", "a", "a:b", "dns:///", "dns:///localhost", "dns:///no.such.host.invalid:1"):
        with pytest.raises(SettingsInvalid):
            resolve(wrong)
