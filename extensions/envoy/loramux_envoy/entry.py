"""The entry of ``loramux envoy`` in the list of commands."""

from typing import Final

from loramux.cli.late import Command, Run


def envoy() -> Run:
    """Print the configuration of an Envoy before replicas."""
    from loramux_envoy.command import envoy

    return envoy


ENVOY: Final = Command(envoy)
