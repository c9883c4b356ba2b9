"""Text in the form in which clients give it back unread: reasoning, and summaries of conversations.

Agents that keep no state on a server ask for ``reasoning.encrypted_content`` and send it with the next turn,
while they drop the text itself. It is no secret here: this is the text in base64.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

PREFIX: Final = "loramux:"


def carried(text: str) -> str:
    """Return a text as an ``encrypted_content``."""
    return PREFIX + base64.b64encode(text.encode(errors="replace")).decode()


def uncarried(content: str) -> str | None:
    """Return the text that an ``encrypted_content`` carries; None where it is not ours. Empty: nothing."""
    if not content:
        return ""
    if not content.startswith(PREFIX):
        return None
    try:
        return base64.b64decode(content.removeprefix(PREFIX), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
