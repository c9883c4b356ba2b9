"""Secrets by name: a file of the secrets folder, else ``LORAMUX_SECRET_<name>``."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import structlog

from loramux_shared.deployment import Repository
from loramux_shared.faults import SourceRefused

log = structlog.get_logger()

ENVIRONMENT_PREFIX = "LORAMUX_SECRET_"
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


class Secrets:
    """The operator's secrets; their values are never shown."""

    def __init__(self, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environment = os.environ if environment is None else environment

    def __repr__(self) -> str:
        return f"Secrets({self._folder})"

    def get(self, name: str, *, default_variable: str = "") -> str | None:
        """Return a secret, or None where it is not set.

        A repository that names no secret gets the variable that its source's own tools read. Raise
        SourceRefused for a name that is no plain name, or a file that cannot be read.
        """
        if not name:
            return self._environment.get(default_variable, "").strip() or None
        if not _PLAIN.fullmatch(name):
            raise SourceRefused(f"secret {name!r}: expected a plain name of letters, digits, '_', '-' and '.'")
        path = self._folder / name if self._folder else None
        if path is not None and path.is_file():
            try:
                return path.read_text(encoding="utf-8").strip() or None
            except (OSError, UnicodeDecodeError) as error:
                raise SourceRefused(
                    f"secret {name!r}: its file cannot be read: {type(error).__name__}"
                ) from error
        return self._environment.get(ENVIRONMENT_PREFIX + name, "").strip() or None

    def hint(self, name: str, *, default_variable: str = "") -> str:
        """Say where the secret of a repository is looked for, for a message."""
        if not name:
            variable = f"Set {default_variable}, or name" if default_variable else "Name"
            return f"{variable} a secret with runtime_secret_name."
        places = [str(self._folder / name)] if self._folder else []
        return f"Secret {name!r} is read from {' or '.join([*places, ENVIRONMENT_PREFIX + name])}."


def warn_unset(repository: Repository) -> None:
    """Say that a repository's secret is not set: files of hosted builders name one for public ones too."""
    log.warning(
        "secret is not set, continuing without it", secret=repository.runtime_secret_name, repo=repository.label
    )
