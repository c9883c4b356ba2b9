from __future__ import annotations

from ipaddress import ip_address

import pytest

from loramux_clouds.public import AddressGuard, is_public
from loramux_shared.faults import SourceRefused, SourceUnavailable


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",  # noqa: S104 - nothing is bound
        "0.1.2.3",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.192",
        "192.0.2.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "192.88.99.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "168.63.129.16",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2002:a00:1::",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%1",
        "fec0::1",
        "ff02::1",
        "100::1",
        "3fff::1",
    ],
)
def test_addresses_that_are_not_public(text):
    """No private, shared, link-local, loopback, multicast, reserved or translated-to-such address is public."""
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::"],
)
def test_addresses_that_are_public(text):
    """Public addresses are, also written as IPv6."""
    assert is_public(ip_address(text))


def guard(*answers: str, allowed: tuple[str, ...] = ()) -> AddressGuard:
    """A guard whose name service always answers so."""
    return AddressGuard(allowed, lambda _host, _port: answers)


def test_one_bad_address_refuses_the_name():
    """A name that has a public address and a private one is refused."""
    assert guard("1.1.1.1", "1.1.1.1").addresses("host", 443) == [ip_address("1.1.1.1")]
    with pytest.raises(SourceRefused, match="start the server with LORAMUX_ALLOWED_HOSTS=host"):
        guard("1.1.1.1", "10.0.0.1").addresses("host", 443)
    with pytest.raises(SourceRefused, match="cannot be read"):
        guard("fe80::1%no such zone%").addresses("host", 443)
    with pytest.raises(SourceUnavailable, match="does not resolve"):
        guard().addresses("host", 443)


@pytest.mark.parametrize(
    ("allowed", "passes"),
    [("host", True), ("HOST:8443", True), ("host:443", False), ("ost", False), ("[::1]", False)],
)
def test_the_operator_allows_hosts(allowed, passes):
    """An allowed host may be anywhere, on any port or on the one that is named."""
    wary = guard("10.0.0.1", allowed=(allowed,))
    if passes:
        assert wary.addresses("host", 8443) == [ip_address("10.0.0.1")]
    else:
        with pytest.raises(SourceRefused):
            wary.addresses("host", 8443)


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f000001", "127.1", "localhost", "::1", "0"])
def test_spellings_of_this_machine_are_refused(host):
    """The name service's answer counts for every spelling of this machine."""
    with pytest.raises((SourceRefused, SourceUnavailable)):
        AddressGuard().addresses(host, 443)
