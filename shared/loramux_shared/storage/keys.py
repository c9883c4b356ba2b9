"""The form of keys."""

from __future__ import annotations


def is_key(key: str) -> bool:
    """True for ``a/b/c``; not with an empty, ``.`` or ``..`` part, a control character, or no UTF-8."""
    parts = key.split("/")
    return {"", ".", ".."}.isdisjoint(parts) and not any(
        char < " " or "\ud800" <= char <= "\udfff" for char in key
    )


def checked_key(key: str) -> str:
    """Return a key as it is.

    Raises:
        ValueError: it is none.
    """
    if not is_key(key):
        raise ValueError(f"{key!r} is no key: expected a/b/c, without empty parts, '.' and '..'")
    return key


def checked_prefix(prefix: str) -> str:
    """Return the beginning of a key as it is; ``a/b``, ``a/`` and nothing are some.

    Raises:
        ValueError: no key begins like this.
    """
    checked_key(f"{prefix}x")
    return prefix
