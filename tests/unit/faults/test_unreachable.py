"""gRPC's messages about an address become causes with cures."""

from __future__ import annotations

from loramux_shared.rpc.status import unreachable


def test_who_died_in_the_middle_is_not_asked_for_tls() -> None:
    """A closed connection is a sign of TLS while it is made, and none after something was heard."""
    connecting = "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:1: Socket closed"
    assert unreachable("a:1", connecting).endswith("Does it speak TLS? Then its address is grpcs://a:1")
    assert unreachable("a:1", "Stream removed (Socket closed)").endswith("Is it running?")
