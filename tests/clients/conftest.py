"""A server of the demo's model and adapters, for clients that know nothing of loramux."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.s3_gateway import free_port
from tests.support.up import up

URL = "CLIENTS_URL"
"""Of a server of the demo that runs already, `http://HOST:PORT`; without it one is started."""


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the demo is served, without the ``/v1``."""
    if running := os.environ.get(URL):
        yield running.rstrip("/").removesuffix("/v1")
        return
    http, grpc, builder = (f"127.0.0.1:{free_port()}" for _ in range(3))
    with up(tmp_path_factory.mktemp("clients"), grpc=grpc, builder=builder, http=http):
        yield f"http://{http}"
