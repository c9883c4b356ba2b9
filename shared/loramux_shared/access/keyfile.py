"""Changes of a keys file; what people wrote into it, comments included, stays as it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from loramux_shared.access.keyring import read_keys_file
from loramux_shared.access.keys import KeyEntry, parse_keys
from loramux_shared.faults import SettingsInvalid

MODE = 0o600
"""File mode of a new key file. The file opens nothing, but its names show who has a key."""


def append_entry(path: Path, entry: KeyEntry) -> None:
    """Add a key to a file, which is made where there is none.

    Raises:
        SettingsInvalid: the file is broken, cannot be written, or has a key of that id.
    """
    before = read_keys_file(path) if path.exists() else ""
    if any(each.id == entry.id for each in parse_keys(before, str(path))):
        raise SettingsInvalid(
            f"{path} has a key {entry.id!r} already. Choose another --id, or remove that one."
        )
    begin = "\n" if before and not before.endswith("\n") else ""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE), "w") as file:
            file.write(f"{begin}{entry.line()}\n")
    except OSError as error:
        raise _cannot(path, error) from error


def remove_entry(path: Path, key_id: str) -> None:
    """Remove a key from a file, in one step for those who read it.

    Raises:
        SettingsInvalid: the file is broken, cannot be written, or has no such key.
    """
    text = read_keys_file(path)
    entries = parse_keys(text, str(path))
    gone = next((entry for entry in entries if entry.id == key_id), None)
    if gone is None:
        known = ", ".join(entry.id for entry in entries) or "none"
        raise SettingsInvalid(f"{path} has no key {key_id!r}. There: {known}.")
    remaining = [line for line in text.splitlines(keepends=True) if gone.sha256 not in line]
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write("".join(remaining))
        shutil.copymode(path, file.name)
        Path(file.name).replace(path)
    except OSError as error:
        raise _cannot(path, error) from error


def _cannot(path: Path, error: OSError) -> SettingsInvalid:
    return SettingsInvalid(f"keys file {path} cannot be written: {error.strerror}.")
