"""The entry of ``loramux bench`` in the list of commands."""

from typing import Final

from loramux.cli.late import Command, Run


def bench() -> Run:
    """Measure an OpenAI-compatible server."""
    from loramux_bench.command import bench

    return bench


BENCH: Final = Command(bench)
