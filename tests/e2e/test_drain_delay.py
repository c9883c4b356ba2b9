"""Services as processes that are told to end while a proxy still sends them work."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux import Client
from loramux.cli.main import app
from tests.support.forks import Forked, builder_service
from tests.support.waiting import wait_until


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[tuple[Forked, str]]:
    """A builder that takes an hour to leave, and its address."""
    log = tmp_path / "log"
    log.touch()
    environment = {**os.environ, "LORAMUX_DRAIN_DELAY_S": "3600"}
    flags = ["--grpc", "127.0.0.1:0", "--store", f"file://{tmp_path}/store", "--work-dir", f"{tmp_path}/work"]
    process = builder_service(flags, log, environment)
    try:
        ready = wait_until(
            lambda: (
                re.findall(r'"grpc": "([^"]+)".*"builder service ready"', log.read_text()) or process.poll()
            ),
            "a builder that is ready",
            log.read_text,
        )
        assert process.poll() is None, log.read_text()
        _until(ready[0], "SERVING")
        yield process, ready[0]
    finally:
        process.kill()
        process.wait()


def _until(address: str, status: str) -> None:
    def health() -> str:
        return CliRunner().invoke(app, ["health", address]).stdout.strip()

    wait_until(lambda: health() == status, f"the health {status}", health)


def test_a_builder_that_leaves_goes_on_until_it_is_told_again(builder: tuple[Forked, str]) -> None:
    """After SIGTERM a builder is NOT_SERVING and answers; a second signal ends it at once."""
    process, address = builder
    process.send_signal(signal.SIGTERM)
    _until(address, "NOT_SERVING")
    with Client(builder=address) as client:
        assert client.deployments() == []
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
