"""What is made once for a whole run of the tests, though several workers need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a path below the folder of the run; whoever comes first makes it, and the others wait."""
    own = factory.getbasetemp()
    path = (own.parent if own.name.startswith("popen-") else own) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path
