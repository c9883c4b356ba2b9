"""A lock of what only one worker of a run may have at a time."""

import pytest
from filelock import FileLock


def one_at_a_time(factory: pytest.TempPathFactory, name: str) -> FileLock:
    """Return a lock that all workers of a run share, as for a numbered port."""
    own = factory.getbasetemp()
    return FileLock((own.parent if own.name.startswith("popen-") else own) / f"{name}.lock")
