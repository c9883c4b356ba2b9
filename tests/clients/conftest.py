"""A server of the demo's model and adapters, for clients that know nothing of loramux."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.real import EXAMPLES, deployment
from tests.support.s3_gateway import free_port

READY_S = 240
URL = "CLIENTS_URL"
"""Of a server of the demo that runs already, `http://HOST:PORT`; without it one is started."""


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the demo is served, without the ``/v1``."""
    if running := os.environ.get(URL):
        yield running
        return
    deployment()
    folder = tmp_path_factory.mktemp("clients")
    web, grpc, builder = (f"127.0.0.1:{free_port()}" for _ in range(3))
    command = [str(Path(sys.executable).parent / "loramux"), "up", str(EXAMPLES / "deployment.yaml")]
    command += ["--store", f"file://{folder}/store", "--grpc", grpc, "--builder", builder, "--http", web]
    log = folder / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        deadline = time.monotonic() + READY_S
        while not re.search(r"^ready", log.read_text(), re.M):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://{web}"
    finally:
        process.terminate()
        process.wait(60)
