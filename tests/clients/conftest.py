"""A server of the demo's model and adapters, for clients that know nothing of loramux."""

import os
from collections.abc import Iterator

import pytest

from tests.support.processes.up import run_up

URL = "CLIENTS_URL"
"""Variable with the URL of a running server of the demo, `http://HOST:PORT`; without it one is started."""


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the served demo, without the ``/v1``."""
    if running := os.environ.get(URL):
        yield running.rstrip("/").removesuffix("/v1")
        return
    with run_up(tmp_path_factory.mktemp("clients")) as served:
        yield f"http://{served.http}"
