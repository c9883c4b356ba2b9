"""The form of keys."""

from __future__ import annotations


def checked_key(key: str) -> str:
    """Return a key as it is.

    Raises:
        ValueError: it is empty, absolute, or has an empty, ``.`` or ``..`` part or a control character.
    """
    if any(part in {"", ".", ".."} for part in key.split("/")) or any(ord(char) < 32 for char in key):
        raise ValueError(f"{key!r} is no key: expected a/b/c, without empty parts, '.' and '..'")
    return key


def checked_prefix(prefix: str) -> str:
    """Return the beginning of a key as it is; ``a/b``, ``a/`` and nothing are some.

    Raises:
        ValueError: no key begins like this.
    """
    checked_key(f"{prefix}x")
    return prefix
