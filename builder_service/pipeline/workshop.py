"""What every build works with."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.sources.open import Sources
from shared.storage.base import Store

PREFIX: Final = "loramux-build-"
LEFTOVER_S: Final = 24 * 3600
"""A folder that was not touched for so long belongs to a builder that was killed."""


@dataclass(frozen=True)
class Workshop:
    """Where a build reads from, writes to, and keeps its files meanwhile."""

    store: Store
    sources: Sources
    work_dir: Path | None = None
    """Holds one folder per build; the system's temporary folder when not given."""

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for one build, removed at its end whatever happens."""
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=self._place()) as name:
            yield Path(name)

    def sweep(self) -> None:
        """Remove the folders that killed builders left."""
        for path in self._place().glob(f"{PREFIX}*"):
            if path.is_dir() and path.stat().st_mtime < time.time() - LEFTOVER_S:
                shutil.rmtree(path, ignore_errors=True)

    def _place(self) -> Path:
        place = self.work_dir or Path(tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        return place
