"""The entry of ``loramux arena`` in the list of commands."""

from typing import Final

from loramux.cli.late import Command, Run


def arena() -> Run:
    """Compare versions on examples with known answers."""
    from loramux_arena.command import arena

    return arena


ARENA: Final = Command(arena)
