"""How long a prompt may be, where that can be told before it is tokenized or copied."""

from __future__ import annotations

from collections.abc import Sized
from typing import Final

from loramux_shared.faults import PromptTooLong

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
