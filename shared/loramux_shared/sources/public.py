"""The hosts that a client's address may name: public ones, and those that the operator allows."""

import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

from loramux_shared.faults import SourceRefused, SourceUnavailable

Address: TypeAlias = IPv4Address | IPv6Address
Resolver: TypeAlias = Callable[[str, int], Sequence[str]]
"""Returns the addresses of a host, as text; raises OSError where there are none."""

GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
NAT64: Final = IPv6Network("64:ff9b::/96")
# Beside what `is_global` knows, whose table grew with patch releases of Python.
NOT_PUBLIC: Final = (
    IPv4Network("168.63.129.16/32"),  # Azure's host, which answers only its own machines
    IPv4Network("192.0.0.0/24"),  # protocol assignments, and the metadata of some clouds
    IPv4Network("192.88.99.0/24"),  # relays
    IPv6Network("2001::/23"),  # protocol assignments, Teredo
    IPv6Network("3fff::/20"),  # documentation
)


def is_public(address: Address) -> bool:
    """Return whether anyone on the internet would reach the same machine under this address."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(inner)
        if address not in GLOBAL_UNICAST:
            return False
    if any(address in network for network in NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast


def look_up(host: str, port: int) -> Sequence[str]:
    """Ask the system for the addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(item[4][0]) for item in found]


@dataclass(frozen=True)
class AddressGuard:
    """Decides which addresses may be connected to."""

    allowed: Collection[str] = ()
    """Addresses that the operator allows: ``HOST`` or ``HOST:PORT``."""
    resolver: Resolver = look_up

    def addresses(self, host: str, port: int) -> list[Address]:
        """Return the addresses of a host, of which every one may be connected to.

        One answer of the name service is used for the check and for the connection: a name whose answer
        changes between two questions gains nothing.

        Raises:
            SourceRefused: one of them is not public, and the operator does not allow the host.
            SourceUnavailable: the name does not resolve.
        """
        try:
            texts = self.resolver(host, port)
        except (OSError, UnicodeError) as error:
            raise SourceUnavailable(f"{host}: the name does not resolve ({type(error).__name__})") from None
        try:
            found = [ip_address(text) for text in dict.fromkeys(texts)]
        except ValueError:
            raise SourceRefused(f"{host}: its addresses cannot be read") from None
        if not found:
            raise SourceUnavailable(f"{host}: the name does not resolve")
        if self._allows(host, port) or all(map(is_public, found)):
            return found
        raise SourceRefused(
            f"{host}: not a public address. Name a public host, or start the server with "
            f"LORAMUX_ALLOWED_HOSTS={host}."
        )

    def _allows(self, host: str, port: int) -> bool:
        bare = f"[{host}]" if ":" in host else host
        return not {bare, f"{bare}:{port}"}.isdisjoint(item.lower() for item in self.allowed)
