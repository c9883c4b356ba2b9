"""What unit tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.fake_services import Fakes, deployment_text


@pytest.fixture(scope="module")
def fakes() -> Iterator[Fakes]:
    """Both services, scripted, in a thread of this process."""
    running = Fakes()
    yield running
    running.close()


@pytest.fixture
def deployment(tmp_path: Path) -> Callable[..., str]:
    """Writes a deployment file of a name and adapters, and returns its path."""

    def write(name: str, *adapters: str) -> str:
        path = tmp_path / "deployment.yaml"
        path.write_text(deployment_text(name, *adapters))
        return str(path)

    return write
