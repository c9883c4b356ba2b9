"""What all tests share."""

from __future__ import annotations

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; two that both compute on all of them wait for each other at every barrier.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Without a GPU, kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from inference_service.kernels.cpu.build import load
from loramux_shared.sources import local
from tests.support import interpreter
from tests.support.examples import SWEEPING
from tests.support.fake_services import Fakes, deployment_text
from tests.support.once import made_once
from tests.support.s3_gateway import S3Server, s3_gateway

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()

# How long an example takes says how busy the machine is, and nothing of the property.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --sweep."""
    parser.addoption("--sweep", action="store_true", help="run the long sweeps too")


def pytest_configure(config: pytest.Config) -> None:
    """Let properties be tried with more examples in a sweep, and a run's many processes keep their bytecode."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if config.getoption("--sweep"):
        os.environ[SWEEPING] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `sweep` unless they are asked for."""
    if not config.getoption("--sweep"):
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="a long sweep: run it with --sweep"))


def pytest_collection_finish() -> None:
    """Spare every later collection of garbage the millions of objects of libraries and tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let libraries find at their end that all of theirs is gone."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _soon_settled() -> Iterator[None]:
    """Folders that a test has just written are listed after 20 ms, two ticks of any file system here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "SETTLED_NS", 20_000_000)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, started at its first use."""
    with s3_gateway() as server:
        yield server


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a start keeps of the compiled operations, of a compiler that may be missing."""
    return made_once(tmp_path_factory, "native", load)


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
