"""How a connection is closed without losing what was said on it last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StagedTransport:
    """A transport that closes in stages.

    A socket that is closed while bytes come, or lie unread, is reset, and its client may lose the last answer.
    So `close` says that nothing more comes, and reads on; the client closes then, or `abort` does when it takes
    too long. Over TLS asyncio does so itself.
    Source: RFC 9112, section 9.6.
    """

    def __init__(self, transport: Any, closed: Callable[[], None]) -> None:
        """Stand before a transport; closed is called when the first stage was."""
        self._transport = transport
        self._closed = closed
        self._said_all = False
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        """Everything else is the transport's."""
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """True when nothing more can be said; what comes is to be dropped."""
        return self._said_all or bool(self._transport.is_closing())

    def close(self) -> None:
        """Say nothing more."""
        if self.is_closing():
            return
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        self._said_all = True
        self.write = _drop
        try:
            self._transport.write_eof()
        except OSError:  # the client was faster
            self._transport.abort()
            return
        self._transport.resume_reading()
        self._closed()


def _drop(data: bytes) -> None:
    """Take what nobody will read."""
