"""Results that are made once for a whole run of the tests, though several workers need them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a path below the folder of the run; the first caller makes it, and the others wait."""
    path = _of_the_run(factory) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


def one_at_a_time(factory: pytest.TempPathFactory, name: str) -> FileLock:
    """Return a lock that all workers of a run share, as for a numbered port."""
    return FileLock(_of_the_run(factory) / f"{name}.lock")


def _of_the_run(factory: pytest.TempPathFactory) -> Path:
    own = factory.getbasetemp()
    return own.parent if own.name.startswith("popen-") else own
