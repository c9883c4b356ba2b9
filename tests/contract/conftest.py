"""Fixtures of contract tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.open import open_store
from tests.support.apart import all_apart
from tests.support.s3_gateway import S3Server


@pytest.fixture
def aws(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The real server, to which this process's AWS_* variables point."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return open_store(f"file://{tmp_path}/store")
    server: S3Server = request.getfixturevalue("aws")
    return open_store(f"s3://{server.new_bucket()}/some/prefix")


@pytest.fixture(scope="session", autouse=True)
def every_api_apart(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --apart, all APIs are made as in an API process."""
    if not request.config.getoption("--apart"):
        yield
        return
    with all_apart():
        yield


@pytest.fixture(scope="module", params=[0, 1], ids=["0 API processes", "1 API process"])
def api_processes(request: pytest.FixtureRequest, every_api_apart: None) -> Iterator[int]:
    """Run the tests of a module twice: with APIs beside the engine, and as in an API process."""
    if request.param == 0 or request.config.getoption("--apart"):
        yield request.param
        return
    with all_apart():
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that look into the service of an API in another process."""
    if config.getoption("--apart"):
        for item in items:
            if item.get_closest_marker("beside"):
                item.add_marker(pytest.mark.skip(reason="looks into the service that the API has beside it"))
