"""The entry of ``loramux run-batch`` in the list of commands."""

from typing import Final

from loramux.cli.late import Command, Run


def run_batch() -> Run:
    """Answer the requests of a file in OpenAI's batch format."""
    from loramux_batches.command import run_batch

    return run_batch


RUN_BATCH: Final = Command(run_batch)
