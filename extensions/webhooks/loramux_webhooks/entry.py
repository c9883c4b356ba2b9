"""The entry of ``loramux webhooks`` in the list of commands."""

from typing import Final

from loramux.cli.late import Command, Run


def webhooks() -> Run:
    """Update adapters when their Hugging Face repositories change."""
    from loramux_webhooks.command import webhooks

    return webhooks


WEBHOOKS: Final = Command(webhooks)
