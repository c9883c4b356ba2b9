"""What all tests share."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; two that both compute on all of them wait for each other at every barrier.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU, kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.support import interpreter
from tests.support.fake_services import Fakes, deployment_text
from tests.support.s3_gateway import S3Server, s3_gateway

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --sweep."""
    parser.addoption("--sweep", action="store_true", help="run the long sweeps too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `sweep` unless they are asked for."""
    if not config.getoption("--sweep"):
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="a long sweep: run it with --sweep"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, started at its first use."""
    with s3_gateway() as server:
        yield server


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
