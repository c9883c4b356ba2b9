"""The end of a helper process that loses the one it helps while it imports what it works with."""

import os
import select
import signal
import threading
from typing import Final

_imported: Final = threading.Event()


def watch(channel: int) -> None:
    """End at once when the channel of a descriptor is closed before that; a port may be held.

    Ctrl-C of a terminal is for the process that is helped, which closes the channel then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait, args=(channel,), daemon=True).start()


def imported() -> None:
    """Leave the end to what was imported, which notices a closed channel itself; signals stay the other's."""
    _imported.set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait(channel: int) -> None:
    closed = select.poll()
    closed.register(channel, 0)  # a peer that is gone is always reported
    closed.poll()
    if not _imported.is_set():
        os._exit(1)
