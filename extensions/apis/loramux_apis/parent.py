"""The end of an API process that has lost the engine's process while it imports what it serves with."""

import os
import select
import sys
import threading
from typing import Final

IMPORTED: Final = threading.Event()
"""Set when the process can take its end from the channel."""


def watch() -> None:
    """End at once when the channel is closed before that: the process holds the port of HTTP."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    channel = select.poll()
    channel.register(int(sys.argv[1]), 0)  # a peer that is gone is always reported
    channel.poll()
    if not IMPORTED.is_set():
        os._exit(1)
