"""Fixtures of contract tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.open import open_store
from tests.support.s3_gateway import S3Server


@pytest.fixture
def aws(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The real server, to which this process's AWS_* variables point."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return open_store(f"file://{tmp_path}/store")
    server: S3Server = request.getfixturevalue("aws")
    return open_store(f"s3://{server.new_bucket()}/some/prefix")
