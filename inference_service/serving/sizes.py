"""Bounds of a prompt and of the JSON of a request, where they can be checked before it is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sized
from typing import Final

import numpy as np

from loramux_shared.faults import PromptTooLong, RequestInvalid

COUNTED: Final = 128 * 1024
"""Tokens that are made of a text that may have more than what is served: it is counted, or cut."""


def countable(max_seq_len: int) -> int:
    """Return how many tokens a text may have that is counted, or cut to its end."""
    return max(COUNTED, max_seq_len)


def check_ids(ids: Sized, max_seq_len: int) -> None:
    """Look at how many token ids there are, before they are copied or looked at one by one.

    Raises:
        PromptTooLong: more than fit.
    """
    if len(ids) > max_seq_len:
        raise prompt_too_long(len(ids), max_seq_len)


def prompt_too_long(tokens: int, max_seq_len: int) -> PromptTooLong:
    """Return the fault of a prompt of so many tokens."""
    return PromptTooLong(
        f"the prompt has {tokens} tokens, and at most {max_seq_len - 1} leave room for an answer. "
        "Shorten the prompt."
    )


MAX_VALUES: Final = 1024 * 1024
"""256 prompts of 4096 token ids."""
MAX_NAMES: Final = 32_768
"""Names, objects and lists, together."""


def unfolds_to(data: bytes) -> str:
    """Say what a JSON text has too much of, before it is parsed; empty where nothing."""
    if not _too_much(data):  # also in what is said: nearly always enough
        return ""
    unescaped = data.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
    text = np.frombuffer(unescaped, np.uint8)
    outside = np.cumsum(text == ord('"'), dtype=np.uint8) & 1 == 0  # parity survives the overflow
    return _too_much(text[outside].tobytes())


def _too_much(data: bytes) -> str:
    if data.count(b":") + data.count(b"{") + data.count(b"[") > MAX_NAMES:
        return f"more than {MAX_NAMES} names, objects and lists"
    return f"more than {MAX_VALUES} values" if data.count(b",") > MAX_VALUES else ""


def json_bytes(value: object) -> int | None:
    """Return how many bytes a value has as JSON; None where it is nested too deeply."""
    try:
        return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except RecursionError:
        return None


def check_texts(texts: Iterable[str]) -> None:
    """Look at all JSON texts inside a request together.

    Raises:
        RequestInvalid: they have too much in them.
    """
    if much := unfolds_to(",".join(texts).encode(errors="replace")):
        raise RequestInvalid(f"the JSON texts of the request have {much}. Send less.")
