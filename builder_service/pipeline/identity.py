"""The identity of a builder: the same after a restart, and another than that of its neighbours."""

from __future__ import annotations

import fcntl
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from loramux_shared.faults import ResourcesExhausted

SLOTS: Final = 100
"""Builders that share one work folder."""


@dataclass(frozen=True)
class Identity:
    """A name that no other living builder has; it is free again when the process ends, however it ends."""

    name: str
    _file: TextIO


def claim_identity(folder: Path) -> Identity:
    """Return the first identity of a work folder that no living builder has.

    Raises:
        ResourcesExhausted: the folder cannot be written, or all of them are taken.
    """
    for slot in range(SLOTS):
        try:
            file = (folder / f"loramux-builder-{slot}.id").open("a+")
        except PermissionError:  # another user's
            continue
        except OSError as error:
            raise ResourcesExhausted(f"the builder's work folder {folder}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        return Identity(_name_in(file), file)
    raise ResourcesExhausted(
        f"the builder's work folder {folder}: no place for another builder. Set LORAMUX_WORK_DIR."
    )


def _name_in(file: TextIO) -> str:
    file.seek(0)
    name = file.read()
    if not re.fullmatch(r"[0-9a-f]{16}", name):  # new, or killed while it was written
        name = secrets.token_hex(8)
        file.truncate(0)
        file.write(name)
        file.flush()
    return name
