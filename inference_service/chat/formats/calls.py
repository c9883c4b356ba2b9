"""Calls on their way out: numbered, with ids, and only of tools that were offered."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from typing import Any, Final

from inference_service.chat.pieces import CallArguments, CallBegun, call_id

SHORT: Final = 9
"""Letters and digits of an id in templates that bound it."""
_LETTERS: Final = string.ascii_letters + string.digits


class Calls:
    """The calls of one answer so far."""

    def __init__(self, offered: Mapping[str, Mapping[str, Any]], *, short_ids: bool = False) -> None:
        """Count the calls of these tools, by name with the JSON schemas of their arguments."""
        self.offered = offered
        self._short = short_ids
        self._count = 0

    def begin(self, name: str) -> CallBegun:
        """Begin a call."""
        self._count += 1
        short = "".join(secrets.choice(_LETTERS) for _ in range(SHORT)) if self._short else ""
        return CallBegun(self._count - 1, short or call_id(), name)

    def more(self, text: str) -> CallArguments:
        """Return more of the arguments of the last call."""
        return CallArguments(self._count - 1, text)
