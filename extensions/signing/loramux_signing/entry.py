"""The entries of ``loramux sign`` and ``loramux verify`` in the list of commands."""

from typing import Final

from loramux.cli.late import Command, Run


def sign() -> Run:
    """Sign a folder, or what is served of a deployment."""
    from loramux_signing.command import sign

    return sign


def verify() -> Run:
    """Verify that a folder or a deployment is as signed."""
    from loramux_signing.command import verify

    return verify


SIGN: Final = Command(sign)
VERIFY: Final = Command(verify)
