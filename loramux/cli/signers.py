"""Signers on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loramux_shared.faults import SettingsInvalid
from loramux_shared.signing.signers import read_signer


def signers(words: Sequence[str] | None) -> tuple[str, ...]:
    """Return the signers that words name; files are read here.

    Raises:
        SettingsInvalid: one is none.
    """
    try:
        return tuple(read_signer(word, Path()) for word in words or ())
    except ValueError as error:
        raise SettingsInvalid(f"--signed-by: expected {error}") from error
